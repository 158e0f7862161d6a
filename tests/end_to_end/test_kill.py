"""Kill -9 of a worker and of the driver, and Ctrl-C: the same command goes on to the same bits.

In two steps of ranks and two of actors: features and routers go the same ways, and a kill takes half a minute or more.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from proper_ds.observe.metrics import read_events
from proper_ds.store.elsewhere import open_store
from tests.end_to_end.runs import CONFIG, command, environment, proper_ds, write_run

WAIT_S = 150.0
SETS = ("OPPU", "proper", "proper-released")
MARK = "TEST_DRIVER"
RANK, ACTOR = "RayTrainWorker", "UnitWorker"


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT_S} s for {what}"
        time.sleep(0.005)


@dataclass
class Driver:
    """A driver in a process group of its own, as a shell would start it."""

    yaml: Path
    log: Path
    arguments: tuple[str, ...] = ()
    process: subprocess.Popen = field(init=False)

    def __post_init__(self) -> None:
        self.mark = uuid.uuid4().hex  # every process that comes of this driver inherits it
        env = environment() | {MARK: self.mark}
        with self.log.open("a", encoding="utf-8") as out:
            self.process = subprocess.Popen(
                command("run", self.yaml, *self.arguments), env=env, stdout=out, stderr=out, start_new_session=True
            )

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.end(signal.SIGKILL)

    def processes(self) -> Iterator[tuple[str, psutil.Process]]:
        """(title, process) of all that came of this driver and still runs."""
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    yield " ".join(process.cmdline()), process
            except psutil.Error:
                continue

    def workers(self, kind: str) -> list[psutil.Process]:
        return [process for title, process in self.processes() if title.startswith(f"ray::{kind}")]

    def kill_a_worker(self, kind: str) -> None:
        wait_for(lambda: self.workers(kind), f"a {kind}")
        self.workers(kind)[-1].kill()

    def end(self, number: int, whole_group: bool = False) -> int:
        """Send a signal, wait for the end, and see that no rank, actor or server of Ray is left.

        Ray's two agents of a node notice the loss of their raylet only after a minute or two, and end then.
        """
        (os.killpg if whole_group else os.kill)(self.process.pid, number)
        code = self.process.wait(timeout=60)
        agents = ("ray::RuntimeEnvAgent", "ray::DashboardAgent")
        wait_for(lambda: all(title.startswith(agents) for title, _ in self.processes()), "Ray to end")
        return code


def committed(folder: Path) -> dict[Path, int]:
    """Every file that says that something is finished, with the time it was written."""
    names = ("*/done.json", "predictions/*/done.json", "group/*/done.json", "store/*/done.json", "router/*/done.json")
    names += (
        "features/*.safetensors",
        "store/*/adapters-*/catalog/fragments/*.arrows",
        "predictions/*/units/*.parquet",
    )
    return {path: path.stat().st_mtime_ns for name in names for path in folder.glob(name)}


def num_units(folder: Path, step: str) -> int:
    where = {
        "user": "store/*/adapters-*/catalog/fragments/*.arrows",
        "evaluate": "predictions/*/units/*.parquet",
    }
    return sum(1 for _ in folder.glob(where[step]))


def last_checkpoint(folder: Path, step: str) -> tuple[int, int]:
    """(finished stages, optimizer steps in the newest checkpoint) of a rank step; only ever grows."""
    root = folder / step
    done = len(list(root.glob("done.json"))) + len(list(root.glob("*/done.json")))
    markers = [*root.glob("checkpoint/*/checkpoint.json"), *root.glob("*/checkpoint/*/checkpoint.json")]
    return done, max((int(path.parent.name.split("-")[1]) for path in markers), default=0)


def is_over(folder: Path, step: str) -> bool:
    num_stages, pattern = {
        "population": (1, "population/done.json"),
        "group": (2, "group/*/done.json"),
        "user": (3, "store/*/done.json"),
        "evaluate": (6, "predictions/*/done.json"),
    }[step]
    return len(list(folder.glob(pattern))) == num_stages


def disturb(yaml: Path, folder: Path, step: str) -> dict[Path, int]:
    """Kill a worker in the middle of a step; once its replacement has moved on, kill the driver."""
    with Driver(yaml, folder.parent / "driver.log") as driver:
        on_ranks = step in ("population", "group")
        progress = (lambda: last_checkpoint(folder, step)) if on_ranks else (lambda: num_units(folder, step))
        start = progress()
        wait_for(lambda: progress() > start, f"{step} to begin")
        driver.kill_a_worker(RANK if on_ranks else ACTOR)
        at_kill = progress()
        wait_for(lambda: progress() > at_kill, f"{step} to go on after the loss of a worker")
        assert not is_over(folder, step), f"{step} was over before the driver was killed: nothing was tested"
        assert driver.end(signal.SIGKILL) == -signal.SIGKILL
    return committed(folder)


@pytest.fixture(scope="module")
def disturbed(finished, tmp_path_factory) -> Path:
    """The finished run's twin, killed in four steps, with two actors instead of one."""
    root = tmp_path_factory.mktemp("killed")
    folder = root / "killed"
    yaml = write_run(folder, finished.data, num_actors=2)
    log = root / "driver.log"
    with Driver(yaml, log) as driver:
        wait_for(lambda: last_checkpoint(folder, "population") > (0, 0), "a checkpoint")
        assert driver.end(signal.SIGINT, whole_group=True) == 130, log.read_text()
        assert "Run the same command again to go on" in log.read_text()
    before: dict[Path, int] = {}
    for step in ("population", "group", "user", "evaluate"):
        now = disturb(yaml, folder, step)
        assert before.items() <= now.items(), "something committed was done again"
        before = now
    output = proper_ds("run", yaml)
    assert before.items() <= committed(folder).items(), "something committed was done again"
    assert "report.html" in output
    return folder


def test_adapters_are_those_of_an_undisturbed_run(finished, disturbed):
    for name in SETS:
        whole, killed = (open_store(run / "store" / name) for run in (finished.folder, disturbed))
        users = whole.users()
        assert sorted(killed.users()) == sorted(users)
        assert len(users) == 38, "all that have a history"
        assert whole.get_many(users).equal(killed.get_many(users))


def test_shared_weights_are_those_of_an_undisturbed_run(finished, disturbed):
    files = [path.relative_to(finished.folder) for path in finished.folder.glob("**/*.safetensors")]
    shared = [path for path in files if path.parts[0] in ("population", "group", "router", "features")]
    assert len(shared) >= 6
    for path in shared:
        whole, killed = load_file(finished.folder / path), load_file(disturbed / path)
        assert whole.keys() == killed.keys()
        assert all(whole[key].equal(killed[key]) for key in whole), path


def test_the_report_is_that_of_an_undisturbed_run(finished, disturbed):
    whole, killed = (json.loads((run / "report.json").read_text())["methods"] for run in (finished.folder, disturbed))
    assert whole == killed


def test_no_step_before_a_checkpoint_is_repeated(finished, disturbed):
    events, _ = read_events(disturbed / "metrics.jsonl", 0)
    for stage in ("population", "group/proper", "group/proper-released", "router/proper", "router/proper-released"):
        steps = [event["step"] for event in events if event["stage"] == stage and "step" in event]
        whole, _ = read_events(finished.folder / "metrics.jsonl", 0)
        num_steps = max(event["step"] for event in whole if event["stage"] == stage and "step" in event)
        assert sorted(set(steps)) == list(range(1, num_steps + 1))
        section = CONFIG[stage.split("/")[0]]
        assert len(steps) <= num_steps + 3 * (section["save_steps"] + 1), steps
