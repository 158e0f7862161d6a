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
    num_bytes = _write(folder, layout)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        open_s, lookup_s, memory_bytes = pool.apply(_open, (str(folder),))
    return {
        "open_million_s": open_s,
        "lookup_million_s": lookup_s,
        "open_million_memory_bytes": memory_bytes,
        "index_bytes_per_user_million": num_bytes / NUM_USERS,
    }


def _write(folder: Path, layout: LoraLayout) -> int:
    random = np.random.default_rng(0)
    number = np.arange(NUM_USERS)
    packs = [f"compacted-00000001-{pack:04d}-01234567.safetensors" for pack in range(NUM_USERS // USERS_PER_PACK)]
    values: dict[str, Any] = {
        "user": [f"user-{each:07d}" for each in range(NUM_USERS)],
        "version": np.ones(NUM_USERS),
        "status": pa.DictionaryArray.from_arrays(np.zeros(NUM_USERS, np.int8), ["stored"]),
        "reason": pa.DictionaryArray.from_arrays(np.zeros(NUM_USERS, np.int32), [""]),
        "pack": pa.DictionaryArray.from_arrays((number // USERS_PER_PACK).astype(np.int32), packs),
        "rank": np.full(NUM_USERS, layout.r),
        "row": number % USERS_PER_PACK,
        "checksum": random.integers(0, 2**32, NUM_USERS),
        "num_items": random.integers(1, 200, NUM_USERS),
        "num_steps": random.integers(10, 100, NUM_USERS),
        "first_loss": random.normal(3, 1, NUM_USERS),
        "last_loss": random.normal(2, 1, NUM_USERS),
        "digest": [random.bytes(16) for _ in range(NUM_USERS)],
        "over": np.ones(NUM_USERS),
        "turn": np.zeros(NUM_USERS),
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


def _open(location: str) -> tuple[float, float, int]:
    """(seconds to open, seconds of a further look-up, growth of resident memory), in a process of its own."""
    AdapterStore(location + "-empty").has("nobody")  # imports
    before = _resident_bytes()
    start_s = time.perf_counter()
    store = AdapterStore(location)
    found = store.entry("user-0765432")
    open_s = time.perf_counter() - start_s
    assert found is not None and store.entry("user-1000000") is None
    start_s = time.perf_counter()
    for number in range(0, NUM_USERS, 1000):
        store.entry(f"user-{number:07d}")
    lookup_s = (time.perf_counter() - start_s) / (NUM_USERS // 1000)
    return open_s, lookup_s, _resident_bytes() - before


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
