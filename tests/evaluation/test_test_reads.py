"""Test users are read for one configuration; every further one is asked for and counted."""

from __future__ import annotations

import pytest

from proper_ds.config import validate
from proper_ds.data.config import DataConfig
from proper_ds.data.prepare import prepare
from proper_ds.errors import UserError
from proper_ds.evaluation.test_reads import DATA_LEDGER, LEDGER, TestData, TestReads, num_reads, read_ledger
from proper_ds.pipeline.stages import StageList


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


def read(one, *folders, again=False, data="d", ledgers=()):
    reads = TestReads([one.output_path, *folders], again)
    reads.check(one, [TestData(data, tuple(ledgers))])
    reads.record(one, [TestData(data, tuple(ledgers))])


def ledger_of(one):
    return read_ledger(one.output_path / LEDGER)


def test_a_second_configuration_is_refused_unless_asked_for(tmp_path):
    first, other = config(tmp_path), config(tmp_path, population={"learning_rate": 1e-3})
    read(first)
    read(first)
    assert len(ledger_of(first)) == 1
    with pytest.raises(UserError, match=r"read once.*--again"):
        read(other)
    read(other, again=True)
    assert num_reads(other.output_path) == 2
    read(first)  # read before: nothing new is learned from them
    assert len(ledger_of(first)) == 2


def test_seeds_and_machines_make_no_other_configuration(tmp_path):
    read(config(tmp_path))
    read(config(tmp_path, seed=7))
    read(config(tmp_path, fleet={"num_actors": 2}))
    read(config(tmp_path, user={"num_tokens_per_batch": 4096}))
    asked = {"split": "test", "methods": ["base", "population"]}
    for idle in ({"num_bootstrap_samples": 99}, {"confidence": 0.9}, {"num_tokens_per_batch": 8192}):
        read(config(tmp_path, evaluation=asked | idle))
    read(config(tmp_path, evaluation=asked | {"references": ["base"]}))
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


def test_another_run_elsewhere_finds_the_ledger_beside_the_data(tmp_path):
    one, two = config(tmp_path, name="a"), config(tmp_path, name="b", population={"learning_rate": 1e-3})
    data = tmp_path / "data"
    data.mkdir()
    read(one, ledgers=[data / DATA_LEDGER])
    with pytest.raises(UserError, match=str(one.output_path)):
        read(two, ledgers=[data / DATA_LEDGER])
    read(two, ledgers=[data / DATA_LEDGER], again=True)
    assert num_reads(two.output_path) == 2
    read(config(tmp_path, name="c", seed=9), ledgers=[data / DATA_LEDGER])


def test_data_that_cannot_be_written_is_read_with_a_warning(tmp_path, caplog):
    read(config(tmp_path), ledgers=[tmp_path / "gone" / DATA_LEDGER])
    assert num_reads(tmp_path / "run") == 1
    assert "will not know that these test users were read" in caplog.text


def test_the_same_files_are_the_same_data_however_they_are_prepared(tmp_path):
    source, small, large = tmp_path / "films", tmp_path / "small", tmp_path / "large"
    for folder in (source, small, large):
        folder.mkdir()
    line = '{"user": "%s", "history": [{"input": "a", "output": "b"}], "query": "q", "answer": "c"}\n'
    for split in ("train", "test"):
        (source / f"{split}.jsonl").write_text(line % "ann" + line % "bob")
    prepare(DataConfig(path=[str(source)], num_users_per_shard=1), small)
    prepare(DataConfig(path=[str(source)]), large)
    found = [
        StageList(config(tmp_path, data=data)).test_data
        for data in ({"path": str(source)}, {"prepared": str(small)}, {"prepared": str(large)})
    ]
    assert len({one.digest for (one,) in found}) == 1
    assert all(source / DATA_LEDGER in one.ledgers for (one,) in found)
    (source / DATA_LEDGER).write_text("")
    assert StageList(config(tmp_path, data={"path": str(source)})).test_data[0] == found[0][0], "a ledger is no data"
