"""`proper-ds store`: each command on a store of two versions, and what it says where something is amiss."""

from __future__ import annotations

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from proper_ds.cli import app
from proper_ds.errors import StoreError
from proper_ds.model.adapter_file import load_peft
from proper_ds.store.store import AdapterStore
from tests.store.stores import LAYOUT, put, rows


@pytest.fixture
def run_folder(tmp_path):
    """A run's folder with a set OPPU: `u` of rank 1, then of rank 2 as version 2; `v`; and `bad` that failed."""
    run = tmp_path / "run"
    (run / "population/adapter").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    made_for = {"base_model_name_or_path": "some/base", "revision": None}
    (run / "population/adapter/adapter_config.json").write_text(json.dumps(made_for))
    store = AdapterStore(run / "store/OPPU")
    put(store, "unit-0", {"u": rows(1, 1, LAYOUT.with_rank(1))[0], "v": rows(1, 2)[0]}, {"bad": "loss is nan"})
    put(store, "unit-0", {"u": rows(1, 3)[0]}, version=2, digests={"u": "abcd"})
    return run


def tell(*arguments):
    result = CliRunner().invoke(app, ["store", *map(str, arguments)], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_ls_show_and_stats(run_folder):
    assert tell("ls", "--run", run_folder).split() == ["u", "v"]
    assert "bad: loss is nan" in tell("ls", "--run", run_folder, "--failed")
    assert tell("ls", "--store", run_folder / "store/OPPU", "--limit", 1).startswith("u\n... 1 more")
    shown = tell("show", "u", "--run", run_folder)
    assert re.search(r"^  version 1: rank 1, 3 items, 2 steps, loss 2.0000 to 1.0000; ", shown, re.M)
    assert re.search(r"^\* version 2: rank 2, .*learned from abcd", shown, re.M)
    assert "users: 2 with an adapter, 1 failed" in tell("stats", "--run", run_folder)


def test_rollback_and_get_give_the_version_and_rank_it_was_trained_with(run_folder, tmp_path):
    assert "version 1 is current" in tell("rollback", "u", "--run", run_folder)
    assert re.search(r"^\* version 1", tell("show", "u", "--run", run_folder), re.M)
    tell("get", "u", "--run", run_folder, "--out", tmp_path / "u")
    row_P, layout = load_peft(tmp_path / "u")
    assert layout == LAYOUT.with_rank(1)
    assert torch.equal(row_P, rows(1, 1, layout)[0])
    about = json.loads((tmp_path / "u/adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"]) == (1, 4.0)


def test_compact_and_verify(run_folder):
    assert "3 adapters are as they were written" in tell("verify", "--run", run_folder)
    assert tell("compact", "--run", run_folder).startswith("4 files of ")
    assert "3 adapters are as they were written" in tell("verify", "--run", run_folder)
    (pack,) = (run_folder / "store/OPPU/packs").iterdir()
    data = bytearray(pack.read_bytes())
    data[-1] ^= 1
    pack.write_bytes(data)
    with pytest.raises(StoreError, match=r"1 of 3 adapters are damaged: user 'u': pack .* the checksum does not match"):
        tell("verify", "--run", run_folder)


def test_what_is_missing_is_said(run_folder, tmp_path):
    with pytest.raises(StoreError, match="has no user 'nobody'"):
        tell("show", "nobody", "--run", run_folder)
    with pytest.raises(StoreError, match="or --store with a folder or URI"):
        tell("ls")
    with pytest.raises(StoreError, match="has no set 'opu'; it has OPPU"):
        tell("ls", "--run", run_folder, "--set", "opu")
    with pytest.raises(StoreError, match="holds no store"):
        tell("ls", "--store", tmp_path / "nothing")
