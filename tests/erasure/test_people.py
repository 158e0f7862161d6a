"""What is looked for afterwards: bytes as they are stored, of every version, and no more than can be searched for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper_ds.erasure import people
from proper_ds.erasure.people import NUM_OF_A_KIND, Traces, traces_of
from proper_ds.erasure.scan import scan
from proper_ds.run_folder import RunFolder
from proper_ds.store.store import AdapterStore
from tests.store.stores import put, rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_stored_version_is_sought_as_it_is_stored(tmp_path, dtype):
    folder = tmp_path / "store/OPPU"
    store = AdapterStore(folder)
    for version in (1, 2, 3):
        found = rows(2, seed=version)
        put(store, "unit-0", {"ann": found[0], "bob": found[1]}, dtype=dtype, version=version)
    traces = traces_of(RunFolder(tmp_path), {}, ["ann"])
    for pack in sorted((folder / "packs").iterdir()):
        data = pack.read_bytes()
        assert sum(trace in data for trace in traces.by_kind["adapter"]) == 1, "one of each version"
    assert {kind for _, kind in scan(folder, [], traces.by_kind).found} == {"adapter"}
    store.forget(["ann"])
    assert scan(folder, [], traces.by_kind).found == []
    assert store.has("bob")


def test_bytes_of_a_damaged_adapter_are_sought_too(tmp_path):
    store = AdapterStore(tmp_path / "store/OPPU")
    put(store, "unit-0", {"ann": rows(1)[0]})
    (pack,) = (tmp_path / "store/OPPU/packs").iterdir()
    data = bytearray(pack.read_bytes())
    data[-1] ^= 1
    pack.write_bytes(data)
    (trace, *_) = traces_of(RunFolder(tmp_path), {}, ["ann"]).by_kind["adapter"]
    assert trace in bytes(data)


@given(counts=st.lists(st.integers(0, 12), max_size=40), limit=st.integers(1, 60))
def test_no_more_are_sought_than_allowed_and_everybody_comes_before_anybody_twice(counts, limit):
    traces = Traces()
    for owner, count in enumerate(counts):
        traces.add("text", [b"%d-%d" % (owner, n) for n in range(count)])
    before, people.MAX_SOUGHT = people.MAX_SOUGHT, limit
    try:
        traces.choose()
    finally:
        people.MAX_SOUGHT = before
    chosen = traces.by_kind.get("text", [])
    assert len(set(chosen)) == len(chosen) == min(limit, sum(min(count, NUM_OF_A_KIND) for count in counts))
    assert traces.num_found.get("text", 0) == sum(counts)
    num_owners = sum(count > 0 for count in counts)
    assert len({trace.split(b"-")[0] for trace in chosen}) == min(limit, num_owners)
