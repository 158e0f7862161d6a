"""Forgetting does not stop at what is wrong with others in a store, hides none of it, and cleans what they say."""

from __future__ import annotations

import pytest

from proper_ds.errors import StoreError
from proper_ds.store.store import AdapterStore
from tests.store.stores import put, rows


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_damaged_records_of_others_are_copied_and_stay_detectable(tmp_path, dtype):
    store = AdapterStore(tmp_path)
    found = rows(3)
    put(store, "unit-0", {"ann": found[0], "bob": found[1], "cid": found[2]}, dtype=dtype)
    kept = store.get("cid")
    path = next((tmp_path / "packs").iterdir())
    data = bytearray(path.read_bytes())
    block = len(found[0]) * (4 if dtype == "float32" else 1)
    scales = 0 if dtype == "float32" else 3 * 2 * 2 * 2 * 4
    start = len(data) - scales - 2 * block  # the second of three records
    data[start + 3] ^= 1
    path.write_bytes(data)
    spoilt = bytes(data[start : start + block])
    store.refresh()
    assert len(store.verify().bad) == 1
    assert store.forget(["ann"]).num_rows == 1
    (line,) = store.verify().bad
    assert "'bob'" in line
    with pytest.raises(StoreError, match="checksum"):
        store.get("bob")
    assert store.get("cid").equal(kept)
    assert spoilt in next((tmp_path / "packs").iterdir()).read_bytes()
    assert not store.has("ann")


def test_a_pack_that_is_missing_does_not_stop_it(tmp_path):
    store = AdapterStore(tmp_path)
    found = rows(3)
    put(store, "unit-0", {"ann": found[0], "bob": found[1]})
    next((tmp_path / "packs").iterdir()).unlink()
    put(store, "unit-1", {"cid": found[2]})
    store.forget(["ann"])
    assert store.history("ann") == []
    with pytest.raises(StoreError, match="missing"):
        store.get("bob")
    assert store.get("cid").equal(found[2])


def test_reasons_of_others_that_name_the_user_are_blanked(tmp_path):
    store = AdapterStore(tmp_path)
    reasons = {"bob-long": "the actor died with ann-long in hand", "cid-long": "the loss is nan"}
    put(store, "unit-0", {"dan-long": rows(1)[0]}, reasons)
    store.compact()
    for _ in range(2):
        store.forget(["ann-long"])  # who has no row of her own
        assert store.failures() == {"bob-long": "(reason removed)", "cid-long": "the loss is nan"}
    assert len(list((tmp_path / "catalog").rglob("*.arrows"))) == 1
    assert store.get("dan-long").equal(rows(1)[0])
