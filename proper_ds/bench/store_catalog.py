"""The part of `bench store` about a catalog of a million users: made as a compaction would leave it, then opened."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from proper_ds.model.lora import LoraLayout
from proper_ds.store.catalog import Catalog, encoded, snapshot_metadata, snapshot_name
from proper_ds.store.index import SCHEMA
from proper_ds.store.store import AdapterStore

NUM_USERS, USERS_PER_PACK = 1_000_000, 5_000


def open_million(folder: Path, layout: LoraLayout) -> dict[str, Any]:
    """Seconds and memory of opening a store of a million users in a fresh process, and of looking one up."""
    num_bytes = write_catalog(folder, layout, NUM_USERS)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        open_s, lookup_s, memory_bytes = pool.apply(open_catalog, (str(folder), NUM_USERS))
    return {
        "open_million_s": open_s,
        "lookup_million_s": lookup_s,
        "open_million_memory_bytes": memory_bytes,
        "index_bytes_per_user_million": num_bytes / NUM_USERS,
    }


def write_catalog(folder: Path, layout: LoraLayout, num_users: int) -> int:
    """A snapshot of so many users; returns its bytes."""
    random = np.random.default_rng(0)
    numbers = np.arange(num_users)
    packs = [f"compacted-00000001-{pack:04d}-01234567.safetensors" for pack in range(-(-num_users // USERS_PER_PACK))]
    values: dict[str, Any] = {
        "user": [f"user-{each:07d}" for each in range(num_users)],
        "version": np.ones(num_users),
        "status": pa.DictionaryArray.from_arrays(np.zeros(num_users, np.int8), ["stored"]),
        "reason": pa.DictionaryArray.from_arrays(np.zeros(num_users, np.int32), [""]),
        "pack": pa.DictionaryArray.from_arrays((numbers // USERS_PER_PACK).astype(np.int32), packs),
        "rank": np.full(num_users, layout.r),
        "row": numbers % USERS_PER_PACK,
        "checksum": random.integers(0, 2**32, num_users),
        "num_items": random.integers(1, 200, num_users),
        "num_steps": random.integers(10, 100, num_users),
        "first_loss": random.normal(3, 1, num_users),
        "last_loss": random.normal(2, 1, num_users),
        "digest": [random.bytes(16) for _ in range(num_users)],
        "over": np.ones(num_users),
        "turn": np.zeros(num_users),
    }
    table = pa.table(
        {
            name: values[name] if isinstance(values[name], pa.Array) else pa.array(values[name]).cast(kind)
            for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True)
        }
    )
    metadata = snapshot_metadata([("unit-0", 1)], [], [json.dumps(layout.to_json())])
    data = encoded(table, metadata, "zstd")
    Catalog(folder / "catalog").files.create(snapshot_name(1), data)
    return len(data)


def open_catalog(location: str, num_users: int) -> tuple[float, float, int]:
    """(seconds to open and look one up, seconds of a further look-up, growth of resident memory); for a new process."""
    AdapterStore(location + "-empty").has("nobody")  # imports
    before = _resident_bytes()
    start_s = time.perf_counter()
    store = AdapterStore(location)
    found = store.entry("user-0000123")
    open_s = time.perf_counter() - start_s
    assert found is not None and not store.has("nobody")
    start_s = time.perf_counter()
    for number in range(0, num_users, 1000):
        store.entry(f"user-{number:07d}")
    lookup_s = (time.perf_counter() - start_s) / (num_users // 1000)
    return open_s, lookup_s, _resident_bytes() - before


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
