"""`proper-joint` on a finished run: trained on from 3.1's adapters on two ranks, stored, answered with, reported."""

from __future__ import annotations

import json
import shutil

import pytest
from peft import PeftConfig

from proper_ds.evaluation.methods import METHODS
from proper_ds.observe.metrics import read_events
from proper_ds.store.elsewhere import open_store
from proper_ds.store.layers import LayeredAdapters
from tests.end_to_end.runs import TIMEOUT_S, proper_ds, write_run
from tests.end_to_end.test_kill import RANK, Driver, wait_for

OPTIONS = (
    "evaluation.methods=[population,proper,proper-joint]",
    "joint.max_steps=24",
    "joint.max_users=20",
    "joint.per_device_train_batch_size=4",
    "joint.learning_rate=2e-3",
    "joint.user_learning_rate=1e-2",
    "joint.logging_steps=8",
)


@pytest.fixture(scope="module")
def joint(finished, tmp_path_factory):
    """(the run's YAML, its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("joint") / "run"
    shutil.copytree(finished.folder, folder)
    yaml = write_run(folder, finished.data)
    return yaml, folder, proper_ds("run", yaml, *OPTIONS)


def test_only_the_joint_stage_is_trained_and_a_second_run_trains_nothing(finished, joint):
    yaml, folder, output = joint
    assert "router (store/proper-joint): begins" in output
    for step in ("population", "group", "user"):
        assert f"{step}: done already" in output
    before, _ = read_events(folder / "metrics.jsonl")
    proper_ds("run", yaml, *OPTIONS)
    assert read_events(folder / "metrics.jsonl")[0] == before
    assert (finished.folder / "router/proper/level.safetensors").read_bytes() == (
        folder / "router/proper/level.safetensors"
    ).read_bytes(), "another stage's result"


def test_sampled_users_get_new_adapters_and_all_others_keep_theirs(joint):
    _, folder, _ = joint
    lower, upper = open_store(folder / "store/proper"), open_store(folder / "store/proper-joint")
    both, sampled = LayeredAdapters(upper, lower), upper.users()
    assert 10 <= len(sampled) <= 20 < len(both.users())
    assert upper.last_version() == 1
    old, new = lower.get_many(lower.users()), both.get_many(lower.users())
    for user, before_P, after_P in zip(lower.users(), old, new, strict=True):
        assert both.is_upper(user) == (user in sampled)
        assert bool((before_P != after_P).any()) == (user in sampled)


def test_the_report_tells_of_it(joint, tmp_path):
    _, folder, output = joint
    report = json.loads((folder / "report.json").read_text())
    assert METHODS["proper-joint"].says == report["method_notes"]["proper-joint"]
    assert report["users"]["sets"]["proper-joint"]["num_adapters"] <= 20
    gates = report["gates"]["store/proper-joint"]
    assert [point["step"] for point in gates["curve"]] == [8, 16, 24]
    assert gates["likeness"] is None
    (jump,) = [jump for jump in report["router_jumps"] if jump["stage"] == "store/proper-joint"]
    assert jump["loss_user_gates"] == pytest.approx(jump["loss_lora_gates"], abs=1e-4), "W_l starts at zero"
    assert "proper-joint" in output
    user = open_store(folder / "store/proper-joint").users()[0]
    proper_ds("store", "get", user, "--run", folder, "--set", "proper-joint", "--out", tmp_path / "mine")
    assert PeftConfig.from_pretrained(tmp_path / "mine").peft_type == "LORA"


def test_a_rank_killed_in_between_changes_no_adapter(finished, joint, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    yaml = write_run(folder, finished.data)
    with Driver(yaml, tmp_path / "log", (*OPTIONS, "joint.save_steps=2")) as driver:
        wait_for(lambda: list(folder.glob("store/proper-joint/checkpoint/*/checkpoint.json")), "a checkpoint")
        driver.kill_a_worker(RANK)
        assert driver.process.wait(timeout=TIMEOUT_S) == 0, (tmp_path / "log").read_text()
    events = [e for e in read_events(folder / "metrics.jsonl")[0] if e["stage"] == "store/proper-joint"]
    begun = [event["from_step"] for event in events if event.get("event") == "begins"]
    assert len(begun) == 2
    assert 0 < begun[1] < 24
    again, wanted = open_store(folder / "store/proper-joint"), open_store(joint[1] / "store/proper-joint")
    assert again.users() == wanted.users()
    difference = again.get_many(wanted.users()) - wanted.get_many(wanted.users())
    assert difference.abs().max() < 1e-6
    assert all(len(again.history(user)) == 1 for user in wanted.users()), "every user is put once"


def test_experts_are_peft_directories_of_the_run(finished):
    for preset, alpha in (("proper", 8.0), ("proper-released", 8.0 / 3)):
        for number in range(3):
            about = PeftConfig.from_pretrained(finished.folder / f"group/{preset}/experts/expert-{number:04d}")
            assert about.lora_alpha == pytest.approx(alpha)
