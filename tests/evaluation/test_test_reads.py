"""Test users are read for one configuration; every further one is asked for and counted."""

from __future__ import annotations

import pytest

from proper_ds.config import validate
from proper_ds.errors import UserError
from proper_ds.evaluation.test_reads import LEDGER, TestReads, num_reads, read_ledger


def config(tmp_path, split="test", name="run", **changes):
    raw = {
        "output_dir": str(tmp_path / name),
        "data": {"path": "somewhere"},
        "base": {"model": "some/model"},
        "evaluation": {"split": split, "methods": ["base", "population"]},
    }
    found = validate(raw | changes, "test")
    found.output_path.mkdir(parents=True, exist_ok=True)
    return found


def read(one, *folders, again=False, data="d"):
    reads = TestReads([one.output_path, *folders], again)
    reads.check(one, data)
    reads.record(one, data)


def test_a_second_configuration_is_refused_unless_asked_for(tmp_path):
    first, other = config(tmp_path), config(tmp_path, population={"learning_rate": 1e-3})
    read(first)
    read(first)
    assert len(read_ledger(first.output_path)) == 1
    with pytest.raises(UserError, match=r"read once.*--again"):
        read(other)
    read(other, again=True)
    assert num_reads(other.output_path) == 2
    read(first)  # read before: nothing new is learned from them
    assert len(read_ledger(first.output_path)) == 2


def test_seeds_and_machines_make_no_other_configuration(tmp_path):
    read(config(tmp_path))
    read(config(tmp_path, seed=7))
    read(config(tmp_path, fleet={"num_actors": 2}))
    assert num_reads(tmp_path / "run") == 1


def test_runs_of_one_study_share_a_ledger_by_data(tmp_path):
    one, two = config(tmp_path, name="a"), config(tmp_path, name="b", seed=3, user={"learning_rate": 1e-3})
    read(one, tmp_path)
    with pytest.raises(UserError, match=str(one.output_path)):
        read(two, tmp_path)
    read(two, tmp_path, data="another task's")
    read(two, tmp_path, again=True)
    assert num_reads(two.output_path) == 2
    assert num_reads(one.output_path) == 1


def test_dev_users_are_nobodys_business(tmp_path):
    read(config(tmp_path, split="dev"))
    read(config(tmp_path, split="dev", population={"learning_rate": 1e-3}))
    assert not (tmp_path / "run" / LEDGER).exists()
    assert num_reads(tmp_path / "run") == 0
