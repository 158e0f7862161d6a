"""The store: what is put comes back bit for bit, commits are all or nothing, damage is noticed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proper_ds.errors import AdapterError, StoreError
from proper_ds.files import atomic_path
from proper_ds.model.lora import LoraLayout, ModuleShape
from proper_ds.store.store import AdapterStore

LAYOUT = LoraLayout((ModuleShape("a.b", 6, 4), ModuleShape("a.c", 4, 8)), 2, 4.0)


def rows(count, seed=0):
    return torch.randn(count, LAYOUT.num_parameters, generator=torch.Generator().manual_seed(seed))


def put(store, unit, adapters, failures=None, dtype="float32"):
    losses = {user: (3, [2.0, 1.0]) for user in (*adapters, *(failures or {}))}
    return store.put_unit(unit, adapters, failures or {}, losses, LAYOUT, dtype)


def test_adapters_come_back_bit_for_bit(tmp_path):
    found = rows(5)
    put(AdapterStore(tmp_path), "unit-0", {f"u{n}": found[n] for n in range(3)}, {"bad": "loss is nan"})
    put(AdapterStore(tmp_path), "unit-1", {f"u{n}": found[n] for n in (3, 4)})
    store = AdapterStore(tmp_path)
    assert torch.equal(store.get_many(["u4", "u0", "u3"]), found[[4, 0, 3]])
    assert store.users() == ["u0", "u1", "u2", "u3", "u4"]
    assert store.failures() == {"bad": "loss is nan"}
    assert store.layout == LAYOUT
    assert store.entry("u1").num_items == 3
    assert (store.entry("u1").first_loss, store.entry("u1").last_loss) == (2.0, 1.0)


def test_bfloat16_halves_the_bytes_and_rounds(tmp_path):
    found = rows(40)
    adapters = {f"u{n}": row for n, row in enumerate(found)}
    whole = put(AdapterStore(tmp_path / "a"), "unit-0", adapters)
    half = put(AdapterStore(tmp_path / "b"), "unit-0", adapters, dtype="bfloat16")
    assert half < 0.6 * whole
    assert torch.equal(AdapterStore(tmp_path / "b").get("u7"), found[7].bfloat16().float())


def test_absent_and_failed_users_say_so(tmp_path):
    put(AdapterStore(tmp_path), "unit-0", {"u": rows(1)[0]}, {"bad": "loss is nan"})
    store = AdapterStore(tmp_path)
    with pytest.raises(StoreError, match="no user 'nobody'"):
        store.get("nobody")
    with pytest.raises(StoreError, match=r"training failed \(loss is nan\)"):
        store.get("bad")
    with pytest.raises(StoreError, match="holds no adapter"):
        AdapterStore(tmp_path / "empty").layout  # noqa: B018


def test_useless_adapters_are_refused_before_anything_is_written(tmp_path):
    store = AdapterStore(tmp_path)
    with pytest.raises(AdapterError, match="no effect"):
        put(store, "unit-0", {"u": rows(1)[0] * 0})
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_changed_byte_is_noticed(tmp_path):
    store = AdapterStore(tmp_path)
    put(store, "unit-0", {"u": rows(1)[0], "v": rows(1, 1)[0]})
    pack = tmp_path / "packs" / "unit-0.safetensors"
    data = bytearray(pack.read_bytes())
    data[-3] ^= 1
    pack.write_bytes(data)
    assert torch.equal(AdapterStore(tmp_path).get("u"), rows(1)[0])
    with pytest.raises(StoreError, match="checksum"):
        AdapterStore(tmp_path).get("v")
    pack.write_bytes(data[: len(data) // 2])
    with pytest.raises(StoreError, match="cannot be read"):
        AdapterStore(tmp_path).get("u")


def test_a_unit_is_committed_by_its_fragment_alone(tmp_path):
    """A pack without a fragment is a unit that was not finished: nobody sees it, and it is written again."""
    store = AdapterStore(tmp_path)
    put(store, "unit-0", {"u": rows(1)[0]})
    (tmp_path / "catalog" / "unit-0.parquet").unlink()
    assert AdapterStore(tmp_path).users() == []
    assert AdapterStore(tmp_path).catalog.units() == set()
    put(AdapterStore(tmp_path), "unit-0", {"u": rows(1, 2)[0]})
    assert torch.equal(AdapterStore(tmp_path).get("u"), rows(1, 2)[0])


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "x") as path:
        path.write_text("half")
        raise RuntimeError("killed")
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=10, unique=True), st.integers(1, 4))
def test_any_order_of_any_users(tmp_path_factory, order, per_unit):
    folder = tmp_path_factory.mktemp("store")
    found = rows(10)
    for start in range(0, 10, per_unit):
        users = range(start, min(10, start + per_unit))
        put(AdapterStore(folder), f"unit-{start}", {f"u{n}": found[n] for n in users})
    assert torch.equal(AdapterStore(folder).get_many([f"u{n}" for n in order]), found[order])
