"""Checkpoints on disk: committed whole or not at all, read back by any number of ranks, and what damage does."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proper_ds.distributed import checkpoint as module
from proper_ds.distributed.apart import AdamSettings
from proper_ds.distributed.checkpoint import MARKER, Checkpoints, Shard, any_complete
from proper_ds.distributed.ranks import Ranks, current_ranks
from proper_ds.distributed.user_table import ShardedTable
from proper_ds.errors import FleetError, UserError
from tests.distributed.gang import run_ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
ABOUT = {"train_batch_size": 8, "num_ranks": 1}
NUM_ROWS = 23


def tensors_of(step):
    return {"weight/a.b": torch.full((2, 3), float(step)), "exp_avg/a.b": torch.arange(6.0)[::2]}


def keep(folder, limit=2, fingerprint="inputs"):
    return Checkpoints(folder, fingerprint, limit)


def save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, tensors_of(step), [], ABOUT, ALONE)


def folders(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("step-*"))


def assert_newest(folder, step, warnings=()):
    checkpoints = keep(folder)
    found = checkpoints.latest(ALONE)
    assert found is not None
    assert len(checkpoints.warnings) == len(warnings)
    assert all(text in warning for text, warning in zip(warnings, checkpoints.warnings, strict=True))
    assert (found.num_steps, found.about) == (step, ABOUT)
    assert found.tensors.keys() == tensors_of(step).keys()
    assert all(torch.equal(found.tensors[name], value) for name, value in tensors_of(step).items())


def test_the_newest_few_are_kept(tmp_path):
    assert keep(tmp_path).latest(ALONE) is None
    save(keep(tmp_path, limit=3), 4, 8, 12, 16)
    assert folders(tmp_path) == [8, 12, 16]
    assert_newest(tmp_path, 16)
    save(keep(tmp_path, limit=1), 20)
    assert folders(tmp_path) == [20]


def test_a_checkpoint_of_other_inputs_is_neither_used_nor_removed(tmp_path):
    save(keep(tmp_path), 4)
    assert keep(tmp_path, fingerprint="others").latest(ALONE) is None
    assert_newest(tmp_path, 4)


@pytest.mark.parametrize("killed_in", ["save_file", "write_json_atomic"])
def test_a_half_written_checkpoint_is_passed_over_and_removed(tmp_path, monkeypatch, killed_in):
    save(keep(tmp_path), 4)
    write = getattr(module, killed_in)

    def killed(*args):
        if killed_in == "save_file":
            write(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, killed_in, killed)
        save(keep(tmp_path), 8)
    assert folders(tmp_path)[0] == 4
    assert_newest(tmp_path, 4)
    assert folders(tmp_path) == [4]


def damage(folder, step, how):
    (path,) = folder.glob(f"step-{step:08d}-*/rank-00000.safetensors")
    if how == "lost":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    if how == "cut":
        del data[-1:]
    else:
        data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "flipped", "lost"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, how):
    save(keep(tmp_path), 4, 8)
    damage(tmp_path, 8, how)
    assert_newest(tmp_path, 4, ["rank-00000.safetensors"])
    save(keep(tmp_path), 8)
    assert_newest(tmp_path, 8)


@pytest.mark.parametrize("marker", [b'{"num_steps": 8, "fing', b"\xff\xfe{}", b'{"num_steps": 8}', b"[]", b""])
def test_a_damaged_marker_is_a_damaged_checkpoint_to_ranks_and_driver(tmp_path, marker):
    save(keep(tmp_path), 4, 8)
    (path,) = tmp_path.glob(f"step-00000008-*/{MARKER}")
    path.write_bytes(marker)
    assert keep(tmp_path).newest_step() == 4
    assert_newest(tmp_path, 4, [MARKER])
    for path in tmp_path.glob(f"*/{MARKER}"):
        path.write_bytes(marker)
    for _ in range(2):
        with pytest.raises(FleetError, match="no checkpoint is whole"):
            keep(tmp_path).latest(ALONE)


def test_where_all_are_damaged_nothing_starts_over_unasked(tmp_path):
    save(keep(tmp_path), 4, 8)
    damage(tmp_path, 4, "flipped")
    damage(tmp_path, 8, "cut")
    for _ in range(2):
        with pytest.raises(FleetError, match=r"step-00000004.*step-00000008.*Delete .* to start the stage over"):
            keep(tmp_path).latest(ALONE)


def table():
    return torch.arange(NUM_ROWS * 3.0).reshape(NUM_ROWS, 3)


def cuts(num_ranks):
    return [NUM_ROWS * rank // num_ranks for rank in range(num_ranks + 1)]


def write_shards(folder):
    """Every rank writes its rows; of `few`, which has fewer rows than there are ranks, most have none."""
    ranks = current_ranks(1)
    start, stop = cuts(ranks.num_ranks)[ranks.rank : ranks.rank + 2]
    shards = [Shard("table/x", table()[start:stop], start, NUM_ROWS)]
    shards.append(Shard("few", table()[min(ranks.rank, 2) : 2][:1], min(ranks.rank, 2), 2))
    shards.append(Shard("everywhere", table(), 0, NUM_ROWS))
    users, others = (ShardedTable(4, 3, seed, ranks, AdamSettings((0.9, 0.999), 1e-8, 0.0)) for seed in (1, 2))
    whole = {"weight": torch.ones(2)} if ranks.is_first else {}
    keep(folder).save(4, whole, shards + users.shards(), ABOUT, ranks)
    found = keep(folder).latest(ranks)
    assert found is not None
    elsewhere = folder / "elsewhere"
    assert any_complete(folder if ranks.is_first else elsewhere, ranks), "all go by what the first rank sees"
    assert not any_complete(elsewhere if ranks.is_first else folder, ranks)
    others.restore(found.rows, 4)  # the last rank holds no line
    for one, other in zip(users.shards(), others.shards(), strict=True):
        assert len(one.tensor) == (2 if ranks.rank < 2 else 0)
        assert torch.equal(one.tensor, other.tensor), one.name
    return found.rows("table/x", 0, NUM_ROWS), found.num_rows("table/x")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    for rows, num_rows in run_ranks(write_shards, 3, folder):
        assert num_rows == NUM_ROWS
        assert torch.equal(rows, table())
    return folder


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_shards_of_three_ranks_are_read_by_any_rows(sharded, data):
    start = data.draw(st.integers(0, NUM_ROWS - 1))
    stop = data.draw(st.integers(start, NUM_ROWS))
    found = keep(sharded).latest(ALONE)
    assert found is not None
    for name in ("table/x", "everywhere"):
        assert torch.equal(found.rows(name, start, stop), table()[start:stop])
    assert torch.equal(found.rows("few", 0, 2), table()[:2])
    assert found.num_rows("none of this name") == 0


def test_rows_that_no_rank_gives_are_our_mistake(tmp_path):
    shards = [Shard("table", table()[:5], 0, NUM_ROWS), Shard("table", table()[6:], 6, NUM_ROWS)]
    with pytest.raises(AssertionError, match="no row 5"):
        keep(tmp_path).save(4, {}, shards, ABOUT, ALONE)
    assert keep(tmp_path).latest(ALONE) is None


def write_to_folders_of_their_own(folder):
    ranks = current_ranks(1)
    shards = [Shard("table", table()[ranks.rank :][:1], ranks.rank, ranks.num_ranks)]
    try:
        keep(folder / str(ranks.rank)).save(4, {}, shards, ABOUT, ranks)
    except UserError as error:
        return str(error)
    return ""


def test_storage_that_ranks_do_not_share_is_refused(tmp_path):
    first, second = run_ranks(write_to_folders_of_their_own, 2, tmp_path)
    assert "storage that all nodes share" in first
    assert not second


def test_a_damaged_shard_is_found_by_whichever_rank_looks(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "copy")
    (path,) = (tmp_path / "copy").glob(f"step-*/{MARKER}")
    (path.parent / "rank-00001.safetensors").write_bytes(b"")
    first, second = run_ranks(latest_error, 2, tmp_path / "copy")
    assert "rank-00001.safetensors has 0 bytes" in first
    assert not second


def latest_error(folder):
    try:
        keep(folder).latest(current_ranks(1))
    except FleetError as error:
        return str(error)
    return ""
