"""`bench control-plane` on a few users: it stops half-way, goes on, and every user is committed once."""

from __future__ import annotations

import json

from proper_ds.bench.control_plane import bench


def test_a_small_control_plane_run(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder, json_file = tmp_path / "run", tmp_path / "result.json"
    folder.mkdir()
    bench(3_000, 1, folder, json_file)  # asserts that all users are there
    result = json.loads(json_file.read_text(encoding="utf-8"))
    first, resumed = result["halves"]
    assert first["num_users"] >= 1_500
    assert 0 < resumed["num_users"] <= 1_500
    assert resumed["plan_s"] < resumed["start_s"] < resumed["first_commit_s"]
    assert result["users_per_s"] > 0
    assert all(driver > 0 and head > 0 for half in result["halves"] for _, _, driver, head in half["samples"])
