"""What rank stages read of the store: a sample of users, without those whose adapters are damaged, up to a limit."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from proper_ds.distributed.ranks import Ranks
from proper_ds.errors import StoreError
from proper_ds.run_folder import RunFolder
from proper_ds.store.elsewhere import open_store, point_to
from proper_ds.training.user_adapters import UserAdapters
from tests.store.stores import put, rows

KEYS = ["ann", "bob", "cold", "cleo", "dora"]
HERE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def adapters(tmp_path):
    """Of a run whose set `proper` holds all but `cold`; `cleo` and `dora` lie in a pack of their own."""
    folder = RunFolder(tmp_path)
    place = folder.stage("store/proper")
    place.begin("now")
    point_to(place.path, None)
    made, store = rows(4), open_store(place.path)
    put(store, "unit-0", {"ann": made[0], "bob": made[1]})
    put(store, "unit-1", {"cleo": made[2], "dora": made[3]})
    context = SimpleNamespace(stage=folder.stage, key_column=pa.array(KEYS, pa.large_string()))
    found = UserAdapters(context, "proper")
    found.packs = sorted((store.location / "packs").iterdir())
    return found


def test_rows_come_by_index_and_those_without_are_not_chosen(adapters):
    mask = np.asarray([True, False, True, True, False])
    assert adapters.stored(mask).tolist() == [True, False, False, True, False]
    assert torch.equal(adapters.rows([3, 0]), rows(4)[[2, 0]])


def damage(pack):
    data = bytearray(pack.read_bytes())
    data[-1] ^= 1  # of the user stored last
    pack.write_bytes(data)


def test_a_damaged_adapter_leaves_out_its_user_alone_and_says_so(adapters, caplog):
    mask = adapters.stored(np.ones(5, dtype=bool))
    assert adapters.without_damaged(mask, 0.0, HERE, "router/proper").tolist() == mask.tolist()
    damage(adapters.packs[1])
    with caplog.at_level(logging.WARNING, logger="proper_ds"):
        left = adapters.without_damaged(mask, 0.25, HERE, "router/proper")
    assert left.tolist() == [True, True, False, True, False]
    assert "the adapter of user 'dora' is left out" in caplog.text
    assert "1 of 4 adapters cannot be read" in caplog.text


def test_more_damage_than_allowed_ends_the_run(adapters):
    mask = adapters.stored(np.ones(5, dtype=bool))
    adapters.packs[1].unlink()
    with pytest.raises(
        StoreError, match=r"2 of 4 adapters of store/proper cannot be read, more than max_damaged_share"
    ):
        adapters.without_damaged(mask, 0.25, HERE, "router/proper")
    left = adapters.without_damaged(mask, 0.5, HERE, "router/proper")
    assert left.tolist() == [True, True, False, False, False]
