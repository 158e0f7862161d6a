"""The run's folder: committed results, what other settings left, and one driver at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from proper_ds.errors import UserError
from proper_ds.run_folder import RunFolder


def test_a_result_counts_only_once_committed_and_only_for_its_inputs(tmp_path):
    stage = RunFolder(tmp_path).stage("group/proper")
    assert not stage.begin("a")
    assert not stage.is_done("a")
    stage.commit("a", {}, 1.0)
    assert stage.is_done("a")
    assert not stage.is_done("b")


def test_results_of_other_inputs_are_kept_aside(tmp_path):
    stage = RunFolder(tmp_path).stage("group/proper")
    stage.begin("a")
    (stage.path / "weights").write_text("precious")
    assert not stage.begin("a"), "the same inputs go on where they were"
    assert (stage.path / "weights").exists()
    assert stage.begin("b")
    assert not (stage.path / "weights").exists()
    kept = list((tmp_path / "superseded").glob("group-proper-*/weights"))
    assert [path.read_text() for path in kept] == ["precious"]


def test_a_commit_removes_what_killed_writers_left(tmp_path):
    stage = RunFolder(tmp_path).stage("store/OPPU")
    stage.begin("a")
    left = stage.path / "packs" / ".unit-1.safetensors.0a1b2c3d.tmp"
    left.parent.mkdir()
    left.write_text("half")
    (stage.path / "packs" / "unit-1.safetensors").write_text("whole")
    stage.commit("a", {}, 0.0)
    assert [path.name for path in left.parent.iterdir()] == ["unit-1.safetensors"]


def test_a_second_driver_is_refused_until_the_first_is_gone(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from proper_ds.run_folder import RunFolder\n"
        f"with RunFolder(Path({str(tmp_path)!r})).locked():\n"
        "    print('locked', flush=True); time.sleep(60)"
    )
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"another run is at work there .process {first.pid} on "):
            RunFolder(tmp_path).locked().__enter__()
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait(timeout=10)
        first.stdout.close()
    with RunFolder(tmp_path).locked():
        pass


def test_storage_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("proper_ds.run_folder.fcntl.flock", no_locks)
    with caplog.at_level("WARNING", "proper_ds"), RunFolder(tmp_path).locked():
        assert "cannot be locked (Function not implemented)" in caplog.text
