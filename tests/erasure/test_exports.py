"""Adapters written elsewhere: what is still ours is deleted, what is not is named, others' are left alone."""

from __future__ import annotations

import shutil

import pytest

from proper_ds.erasure import exports
from proper_ds.erasure.exports import EXPORTS, erase_exports, erase_records, export, read_exports
from proper_ds.errors import DataError


def written(tmp_path, user, name, weights):
    folder = tmp_path / name

    def write(made):
        (made / "adapter_model.safetensors").write_bytes(weights)
        (made / "adapter_config.json").write_text("{}")

    export(tmp_path, user, "OPPU", folder, write)
    assert (folder / "adapter_model.safetensors").read_bytes() == weights
    return folder


def test_only_what_was_exported_of_the_user_is_deleted(tmp_path):
    mine, beside = written(tmp_path, "ann", "mine", b"1"), written(tmp_path, "ann", "beside", b"2")
    (beside / "notes.txt").write_text("not ours")
    moved, replaced = written(tmp_path, "ann", "moved", b"3"), written(tmp_path, "ann", "replaced", b"4")
    other = written(tmp_path, "bob", "other", b"5")
    shutil.rmtree(moved)
    written(tmp_path, "bob", "replaced", b"6")
    erased = erase_exports(tmp_path, {"ann"})
    assert (erased.folders, erased.num_bytes) == ([str(mine), str(beside)], 6)
    assert not mine.exists()
    assert [path.name for path in beside.iterdir()] == ["notes.txt"]
    assert [folder for folder, _ in erased.not_reached] == [str(moved), str(replaced)]
    assert (other / "adapter_model.safetensors").exists()
    assert (replaced / "adapter_model.safetensors").read_bytes() == b"6"
    erase_records(tmp_path, {"ann"}, erased.folders)
    assert erase_exports(tmp_path, {"ann"}) == exports.ErasedExports([], 0, erased.not_reached), "told again"
    erase_records(tmp_path, {"ann"})
    assert [found.user for found in read_exports(tmp_path)] == ["bob", "bob"]
    assert erase_exports(tmp_path, {"ann"}).not_reached == []


@pytest.mark.parametrize("weights", [(b"1", b"2"), (b"1", b"1"), (b"2", b"1")])
def test_what_was_exported_twice_to_one_folder_is_deleted_once(tmp_path, weights):
    for each in weights:
        folder = written(tmp_path, "ann", "mine", each)
    assert erase_exports(tmp_path, {"ann"}) == exports.ErasedExports([str(folder)], 3, [])
    assert not folder.exists()


@pytest.mark.parametrize("num_done", [0, 1, 2])
def test_a_crash_while_it_is_written_leaves_a_record(tmp_path, monkeypatch, num_done):
    copy, left = shutil.copyfile, [num_done]

    def cut_short(source, target):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        copy(source, target)

    monkeypatch.setattr(exports.shutil, "copyfile", cut_short)
    if num_done < 2:
        with pytest.raises(KeyboardInterrupt):
            written(tmp_path, "ann", "mine", b"1")
    else:
        written(tmp_path, "ann", "mine", b"1")
    (tmp_path / "mine/.adapter_model.safetensors.1234abcd.tmp").write_bytes(b"half")
    assert [found.user for found in read_exports(tmp_path)] == ["ann"]
    erase_exports(tmp_path, {"ann"})
    assert not (tmp_path / "mine").exists()


def test_a_users_name_may_hold_what_some_take_for_the_end_of_a_line(tmp_path):
    users = ["a\u2028b", "c\u0085d", "e"]
    for user in users:
        written(tmp_path, user, f"of-{users.index(user)}", b"1")
    assert [found.user for found in read_exports(tmp_path)] == users
    erase_records(tmp_path, {users[0]})
    assert [found.user for found in read_exports(tmp_path)] == users[1:]


def test_a_damaged_record_is_said_with_its_line(tmp_path):
    written(tmp_path, "ann", "mine", b"1")
    with (tmp_path / EXPORTS).open("a") as file:
        file.write("{\n")
    with pytest.raises(DataError, match="line 2 cannot be read"):
        erase_exports(tmp_path, {"ann"})
