"""`proper-ds bench store` on few small adapters: it measures both sides, says so, and leaves nothing behind."""

from __future__ import annotations

import json

import pytest

from proper_ds.bench import store_catalog
from proper_ds.bench.store import BATCH, run


@pytest.fixture
def small_catalog(monkeypatch):
    """In place of the catalog of a million, which a process of its own opens, one of 3,000 in this process."""

    def open_here(folder, layout):
        num_bytes = store_catalog.write_catalog(folder, layout, 3000)
        open_s, lookup_s, memory_bytes = store_catalog.open_catalog(str(folder), 3000)
        return {
            "open_million_s": open_s,
            "lookup_million_s": lookup_s,
            "open_million_memory_bytes": memory_bytes,
            "index_bytes_per_user_million": num_bytes / 3000,
        }

    monkeypatch.setattr("proper_ds.bench.store.open_million", open_here)


def test_it_measures_and_tidies_up(tmp_path, small_catalog, capsys):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    run(300, 10_000, 1, scratch, tmp_path / "found.json")
    assert list(scratch.iterdir()) == []
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["num_written"] == {"store": 300, "directories": BATCH, "unsynced": BATCH, "save_pretrained": 100}
    assert set(found["write_ratio"]) == {"directories", "unsynced", "save_pretrained"}
    for key in ("write_per_s", "warm_read_s", "cold_read_s", "batch_256_s", "forget_s"):
        assert found[key]["store"] > 0
        assert found[key]["directories"] > 0
    assert found["relative_error"]["float32"] == 0
    assert found["index_bytes_per_user_million"] < 64
    assert 0 < found["relative_error"]["bfloat16"] < found["relative_error"]["int8"] < 0.01
    told = capsys.readouterr().out
    assert "save_pretrained" in told
    assert "batch of 256" in told
