"""One run of the user stage on three hosts, of which one is killed, one cut off and healed, and the driver killed.

`pytest tests/fleet/test_hosts.py` runs it: four minutes on two cores, as root, with iproute2; skipped without them.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from proper_ds.observe.metrics import read_events
from proper_ds.store.elsewhere import open_store
from proper_ds.store.store import AdapterStore
from tests.end_to_end.runs import CONFIG, REPO, proper_ds
from tests.fleet.hosts import RAY_PORT, Host, hosts, lacking, wait_for

ACTOR = "ray::UnitWorker"
CUT_DELAY_S = 60.0
"""What a host that is cut off may cost the run."""
WAIT_S = 120.0
TRAINING_S = 110.0
"""Of all units together, whatever the machine: the disturbances take some 40 s."""

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking() or "hosts can be made")


def write_run(folder: Path, data: Path, num_epochs: int) -> Path:
    """A run of OPPU adapters with many small units that take seconds each."""
    config = CONFIG | {
        "output_dir": str(folder),
        "data": {"path": [str(data / "generated_tags"), str(data / "generated_ratings")]},
        "population": CONFIG["population"] | {"max_steps": 30},
        "user": CONFIG["user"] | {"num_train_epochs": num_epochs},
        "distributed": CONFIG["distributed"] | {"num_ranks": 1},
        "fleet": {"num_tokens_per_unit": 1200},
        "evaluation": CONFIG["evaluation"] | {"methods": ["OPPU"]},
    }
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@dataclass
class UserStage:
    """The user stage of one run on some hosts, the first of which is the head and the driver's."""

    yaml: Path
    folder: Path
    log: Path
    ray_log: Path
    hosts: list[Host]

    def keepalive(self) -> dict[str, str]:
        lines = (REPO / "cluster/ray.env").read_text(encoding="utf-8").splitlines()
        return dict(line.split("=") for line in lines if not line.startswith("#"))

    def start_ray(self, host: Host, **env: str) -> None:
        host.start_ray(self.hosts[0], self.ray_log, **env)

    def start_driver(self):
        command = [sys.executable, "-m", "proper_ds", "run", self.yaml, "--steps", "user"]
        env = {"RAY_ADDRESS": f"{self.hosts[0].address}:{RAY_PORT}", "HF_HUB_OFFLINE": "1", "COLUMNS": "300"}
        return self.hosts[0].start(command, self.log, **env)

    def kill_driver(self, process) -> None:
        """SIGKILL of the driver alone; `ip netns exec` has become it."""
        process.kill()
        process.wait(timeout=10)

    def committed(self) -> set[str]:
        return open_store(self.folder / "store/OPPU").units()

    def wait_for_commits(self, count: int) -> None:
        goal = len(self.committed()) + count
        wait_for(lambda: len(self.committed()) >= goal, f"{count} more units", WAIT_S)

    def wait_for_actor(self, host: Host) -> None:
        wait_for(lambda: host.processes(ACTOR), f"an actor on {host.address}", WAIT_S)

    def said(self, pattern: str) -> list[str]:
        return re.findall(pattern, self.log.read_text(encoding="utf-8"))

    def when_known(self, unit: str) -> float | None:
        """When the driver learned that a unit is committed."""
        events, _ = read_events(self.folder / "metrics.jsonl")
        return next((event["time"] for event in events if event.get("unit") == unit), None)


def cut_and_see_its_unit_done_elsewhere(stage: UserStage, host: Host) -> float:
    """Take out a host's cable while it trains; returns the seconds until what it had was done elsewhere."""
    stage.wait_for_actor(host)
    retried = r"OPPU (unit-\d+-\d+) will be tried again"
    before = len(stage.said(retried))
    cut_s = time.time()
    host.cut()
    wait_for(lambda: len(stage.said(retried)) > before, "the loss to be noticed", CUT_DELAY_S)
    unit = stage.said(retried)[before]
    wait_for(lambda: stage.when_known(unit) is not None, f"{unit} to be done elsewhere", CUT_DELAY_S)
    known_s = stage.when_known(unit)
    assert known_s is not None
    return known_s - cut_s


def rejoin(stage: UserStage, host: Host) -> None:
    """What an operator or KubeRay does with a lost host: start Ray there again; here without cluster/ray.env."""
    host.kill()
    stage.start_ray(host)
    stage.wait_for_actor(host)


@dataclass(frozen=True)
class Prepared:
    """A run that is ready for its user stage, and how many epochs make that long enough for all that is to happen."""

    data: Path
    folder: Path
    num_epochs: int

    def copy(self, folder: Path) -> Path:
        """The YAML of a copy in `folder`."""
        shutil.copytree(self.folder, folder)
        return write_run(folder, self.data, self.num_epochs)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Prepared:
    root = tmp_path_factory.mktemp("prepared")
    data, folder = root / "data", root / "run"
    proper_ds("data", "generate", "--users", "120", "--groups", "3", "--seed", "5", "--out", data)
    proper_ds("run", write_run(folder, data, 1), "--steps", "prepare,base,tokens,population")
    probe = Prepared(data, folder, 4).copy(root / "probe")
    proper_ds("run", probe, "--steps", "user")
    events, _ = read_events(root / "probe/metrics.jsonl")
    seconds = sum(event["seconds"] for event in events if event["stage"] == "user" and "unit" in event)
    return Prepared(data, folder, max(4, round(4 * TRAINING_S / seconds)))


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory) -> AdapterStore:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    proper_ds("run", prepared.copy(folder), "--steps", "user")
    return open_store(folder / "store/OPPU")


def test_hosts_and_the_driver_lost_in_one_run(prepared, undisturbed, tmp_path, record_testsuite_property):
    folder = tmp_path / "run"
    with hosts(3) as rack:
        stage = UserStage(prepared.copy(folder), folder, tmp_path / "driver.log", tmp_path / "ray.log", rack)
        _, second, third = rack
        for host in rack:
            stage.start_ray(host, **stage.keepalive())
        driver = stage.start_driver()
        for host in rack:
            stage.wait_for_actor(host)
        stage.wait_for_commits(3)

        delay_s = cut_and_see_its_unit_done_elsewhere(stage, third)
        record_testsuite_property("delay_by_a_cut_host_s", round(delay_s, 1))  # `--junit-xml FILE` writes it down
        assert delay_s < CUT_DELAY_S

        second.kill()
        stage.wait_for_commits(2)
        third.heal()
        rejoin(stage, second)
        wait_for(lambda: "without RAY_grpc_client_keepalive_time_ms" in stage.log.read_text(), "a warning", WAIT_S)
        stage.wait_for_commits(2)
        assert driver.poll() is None, stage.log.read_text()

        stage.kill_driver(driver)
        at_kill = stage.committed()
        assert len(at_kill) < len(undisturbed.catalog.units()), "all was done before the driver was killed"
        driver = stage.start_driver()
        assert driver.wait(timeout=240) == 0, stage.log.read_text()

    found = open_store(folder / "store/OPPU")
    assert (folder / "store/OPPU/done.json").exists()
    assert at_kill <= stage.committed() == undisturbed.catalog.units()
    users = found.users()
    assert len(users) == len(set(users))
    assert sorted(users) == sorted(undisturbed.users())
    assert found.failures() == undisturbed.failures()
    assert torch.equal(found.get_many(users), undisturbed.get_many(users)), "not the adapters of an undisturbed run"
