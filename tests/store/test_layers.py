"""Many users asked for at once, and two sets of adapters read as one."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch

from proper_ds.store.layers import LayeredAdapters
from proper_ds.store.store import AdapterStore
from tests.store.stores import put, rows


@pytest.fixture
def lower(tmp_path):
    """`ann` with two versions, `bob` rolled back, `cleo` who failed at first and `dora` later, `eve` who failed."""
    store = AdapterStore(tmp_path / "lower")
    made = rows(4, 1)
    first = {"ann": made[0], "bob": made[1], "dora": made[2]}
    put(store, "u", first, {"cleo": "nan", "eve": "nan"}, digests=dict.fromkeys((*first, "cleo", "eve"), "01"))
    second = {"ann": rows(1, 5)[0], "bob": rows(1, 6)[0], "cleo": made[3]}
    put(store, "u", second, {"dora": "nan"}, version=2, digests=dict.fromkeys((*second, "dora"), "02"))
    store.rollback("bob")
    return store


def test_has_many_is_has_of_each(lower):
    users = ["zoe", "ann", "eve", "dora", "ann", "cleo", "bob"]
    assert lower.has_many(pa.array(users, pa.large_string())).tolist() == [lower.has(user) for user in users]
    assert lower.has_many(pa.array([], pa.large_string())).tolist() == []


def test_the_upper_set_counts_for_the_history_it_was_learned_from(tmp_path, lower):
    upper = AdapterStore(tmp_path / "upper")
    new = rows(4, 9)
    # ann's is of the newest history, bob's of the one rolled back to; cleo's of an earlier one; dora failed there
    put(upper, "ann", {"ann": new[0]}, digests={"ann": "02"})
    put(upper, "bob", {"bob": new[1]}, digests={"bob": "01"})
    put(upper, "cleo", {"cleo": new[2]}, digests={"cleo": "01"})
    put(upper, "dora", {}, {"dora": "nan"}, digests={"dora": "01"})
    both = LayeredAdapters(upper, lower)
    assert [user for user in both.users() if both.is_upper(user)] == ["ann", "bob"]
    users = ["dora", "bob", "cleo", "ann"]
    found = both.get_many(users)
    assert torch.equal(found[1], new[1])
    assert torch.equal(found[3], new[0])
    assert torch.equal(found[0], lower.get("dora"))
    assert torch.equal(found[2], lower.get("cleo"))
    assert both.has("cleo")
    assert not both.has("eve")
    assert both.layout == lower.layout
