"""Ranks on two hosts: one is killed in the middle of each stage, a host is cut off, a run goes on with other ranks.

`pytest tests/fleet/test_rank_hosts.py`: some five minutes on two cores, as root, with iproute2; skipped without them.
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
from safetensors.torch import load_file

from proper_ds.observe.metrics import read_events
from tests.end_to_end.runs import CONFIG, REPO, proper_ds
from tests.fleet.hosts import RAY_PORT, Host, hosts, lacking, wait_for

RANK = "ray::RayTrainWorker"
CUT_DELAY_S = 60.0
"""Within which a host that is cut off must have been noticed."""
WAIT_S = 150.0
NUM_STEPS = {"population": 80, "group": 48, "router": 48}
SAVE_STEPS = 4
STAGES = {"population": "population", "group": "group/proper", "router": "router/proper"}
LATER = ("population", "features", "group", "store", "router")
TOLERANCE = 1e-4

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking() or "hosts can be made")


def write_run(folder: Path, data: Path) -> Path:
    """A run of two ranks whose every step is logged, up to the LoRA-aware router."""
    rank_stages = {
        name: CONFIG[name] | {"max_steps": count, "save_steps": SAVE_STEPS, "lora": {"lora_dropout": 0.1}}
        for name, count in NUM_STEPS.items()
        if name != "router"
    }
    config = (
        CONFIG
        | rank_stages
        | {
            "output_dir": str(folder),
            "data": {"path": [str(data / "generated_tags"), str(data / "generated_ratings")]},
            "router": CONFIG["router"] | {"max_steps": NUM_STEPS["router"], "save_steps": SAVE_STEPS},
            "evaluation": CONFIG["evaluation"] | {"methods": ["proper"]},
        }
    )
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@dataclass
class Run:
    """A run in `folder` whose driver is on the first of some hosts."""

    folder: Path
    yaml: Path
    rack: list[Host]

    @property
    def log(self) -> Path:
        return self.folder.parent / "driver.log"

    def start_ray(self, host: Host, num_cpus: int = 1) -> None:
        lines = (REPO / "cluster/ray.env").read_text(encoding="utf-8").splitlines()
        keepalive = dict(line.split("=") for line in lines if not line.startswith("#"))
        host.start_ray(self.rack[0], self.folder.parent / "ray.log", num_cpus, **keepalive)

    def start_driver(self, steps: str, *overrides: str):
        command = [sys.executable, "-m", "proper_ds", "run", self.yaml, "--steps", steps, *overrides]
        env = {"RAY_ADDRESS": f"{self.rack[0].address}:{RAY_PORT}", "HF_HUB_OFFLINE": "1", "COLUMNS": "300"}
        return self.rack[0].start(command, self.log, **env)

    def newest_step(self, stage: str) -> int:
        markers = (self.folder / STAGES[stage]).glob("checkpoint/*/checkpoint.json")
        return max((int(path.parent.name.split("-")[1]) for path in markers), default=0)

    def wait_for_step(self, stage: str, step: int) -> None:
        done = self.folder / STAGES[stage] / "done.json"
        wait_for(lambda: self.newest_step(stage) >= step, f"step {step} of {stage}: {self.said()}", WAIT_S)
        assert not done.exists(), f"{stage} was over before anything was disturbed"

    def kill_a_rank(self, host: Host) -> None:
        """SIGKILL of the rank on a host, which waits for the rank on the other one then."""
        (rank,) = host.processes(RANK)
        rank.kill()

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def losses(self, stage: str) -> list[float]:
        """The loss of every step; of a step that was repeated, the last."""
        events, _ = read_events(self.folder / "metrics.jsonl")
        found = {
            event["step"]: event["loss"] for event in events if event["stage"] == STAGES[stage] and "step" in event
        }
        assert sorted(found) == list(range(1, NUM_STEPS[stage] + 1))
        return [found[step] for step in sorted(found)]

    def num_repeated(self, stage: str) -> int:
        events, _ = read_events(self.folder / "metrics.jsonl")
        return sum(event["stage"] == STAGES[stage] and "step" in event for event in events) - NUM_STEPS[stage]

    def weights(self, stage: str) -> dict:
        files = {"population": "adapter/adapter_model.safetensors"}
        return load_file(self.folder / STAGES[stage] / files.get(stage, "level.safetensors"))

    def assert_equals(self, whole: Run, stage: str) -> None:
        assert (self.folder / STAGES[stage] / "done.json").exists(), self.said()
        assert self.losses(stage) == pytest.approx(whole.losses(stage), abs=TOLERANCE)
        found, wanted = self.weights(stage), whole.weights(stage)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=TOLERANCE, msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    """A run of two ranks on this machine that nothing disturbed."""
    root = tmp_path_factory.mktemp("whole")
    data, folder = root / "data", root / "run"
    proper_ds("data", "generate", "--users", "30", "--groups", "3", "--seed", "5", "--out", data)
    path = write_run(folder, data)
    proper_ds("run", path, "--steps", "prepare,base,tokens,population,features,group,user,router")
    return Run(folder, path, [])


def begun(whole: Run, root: Path, rack: list[Host]) -> Run:
    """A copy of the run that is to do again what ranks and actors do."""
    folder = root / "run"
    shutil.copytree(whole.folder, folder)
    for name in LATER:
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "metrics.jsonl").unlink()
    return Run(folder, write_run(folder, whole.folder.parent / "data"), rack)


def test_a_rank_killed_in_the_middle_of_each_stage(whole, tmp_path):
    with hosts(2) as rack:
        run = begun(whole, tmp_path, rack)
        for host in rack:
            run.start_ray(host)
        driver = run.start_driver(",".join(LATER).replace("store", "user"))
        for stage, host in zip(STAGES, (rack[1], rack[0], rack[1]), strict=True):
            run.wait_for_step(stage, 12)
            run.kill_a_rank(host)
            wait_for(lambda stage=stage: f"from step {run.newest_step(stage)} of" in run.said(), "a restart", WAIT_S)
        assert driver.wait(timeout=240) == 0, run.said()
    for stage in STAGES:
        assert run.num_repeated(stage) <= SAVE_STEPS + 1
        run.assert_equals(whole, stage)
    assert len(re.findall(r"rank \d was lost", run.said())) == len(STAGES), run.said()


def test_a_host_cut_off_and_later_four_ranks(whole, tmp_path, record_testsuite_property):
    with hosts(2) as rack:
        run = begun(whole, tmp_path, rack)
        first, second = rack
        run.start_ray(first, num_cpus=2)
        run.start_ray(second, num_cpus=2)
        driver = run.start_driver("population", "distributed.num_cpus_per_rank=2")
        run.wait_for_step("population", 12)
        assert [len(host.processes(RANK)) for host in rack] == [1, 1]

        second.cut()
        start_s = time.monotonic()
        wait_for(lambda: "was lost" in run.said(), f"the cut to be noticed: {run.said()}", CUT_DELAY_S)
        noticed_s = time.monotonic() - start_s
        record_testsuite_property("delay_by_a_cut_host_s", round(noticed_s, 1))  # `--junit-xml FILE` writes it down
        wait_for(lambda: "population: 1 rank, from step" in run.said(), "a restart on the host that is left", WAIT_S)
        run.wait_for_step("population", run.newest_step("population") + 8)

        driver.kill()  # the driver alone: `ip netns exec` has become it
        driver.wait(timeout=10)
        second.kill()
        second.heal()
        run.start_ray(second, num_cpus=2)
        wait_for(lambda: not first.processes(RANK), "the rank of the killed driver to end", WAIT_S)
        driver = run.start_driver("population", "distributed.num_ranks=4")
        assert driver.wait(timeout=240) == 0, run.said()
    assert "population: 4 ranks, from step" in run.said()
    run.assert_equals(whole, "population")
