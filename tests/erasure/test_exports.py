"""Adapters written elsewhere: what is still ours is deleted, what is not is named, others' are left alone."""

from __future__ import annotations

import shutil

import pytest

from proper_ds.erasure.exports import EXPORTS, erase_exports, read_exports, record_export
from proper_ds.errors import DataError


def export(tmp_path, user, name, weights):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text("{}")
    record_export(tmp_path, user, "OPPU", folder)
    return folder


def test_only_what_was_exported_of_the_user_is_deleted(tmp_path):
    mine, beside = export(tmp_path, "ann", "mine", b"1"), export(tmp_path, "ann", "beside", b"2")
    (beside / "notes.txt").write_text("not ours")
    moved, replaced = export(tmp_path, "ann", "moved", b"3"), export(tmp_path, "ann", "replaced", b"4")
    other = export(tmp_path, "bob", "other", b"5")
    shutil.rmtree(moved)
    export(tmp_path, "bob", "replaced", b"6")
    num_folders, num_bytes, not_reached = erase_exports(tmp_path, ["ann"])
    assert (num_folders, num_bytes) == (2, 6)
    assert not mine.exists()
    assert [path.name for path in beside.iterdir()] == ["notes.txt"]
    assert [line.split(":")[0] for line in not_reached] == [str(moved), str(replaced)]
    assert (other / "adapter_model.safetensors").exists()
    assert (replaced / "adapter_model.safetensors").read_bytes() == b"6"
    assert [found.user for found in read_exports(tmp_path)] == ["bob", "bob"]
    assert erase_exports(tmp_path, ["ann"]) == (0, 0, [])


def test_a_damaged_record_is_said_with_its_line(tmp_path):
    export(tmp_path, "ann", "mine", b"1")
    with (tmp_path / EXPORTS).open("a") as file:
        file.write("{\n")
    with pytest.raises(DataError, match="line 2 cannot be read"):
        erase_exports(tmp_path, ["ann"])
