"""Stages cut short in the middle and gone on with, by as many ranks or others: the loss curve is that of one run.

The stages are the real ones, with dropout and augmentation on, and only the fleet is left out.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from proper_ds.config import load_config
from proper_ds.distributed.engine import RankEngine
from proper_ds.distributed.ranks import current_ranks
from proper_ds.fleet.plan import Unit
from proper_ds.observe.metrics import read_events
from proper_ds.run_folder import RunFolder
from proper_ds.training.rank_jobs import run_stages
from proper_ds.training.unit_jobs import FeaturesJob
from tests.distributed.gang import run_ranks
from tests.end_to_end.runs import CONFIG, REPO, proper_ds

NUM_USERS, NUM_STEPS, SAVE_STEPS, CUT_AT = 20, 14, 4, 10
STAGES = ("population", "group/proper", "group/proper-released")
RESULTS = {"population": "adapter/adapter_model.safetensors"}
TOLERANCE = 1e-5
ZERO = f"distributed.deepspeed={REPO}/ds_configs/"
SPARSE_STAGES = ("group/proper",)
SPARSE = ("group.top_k=2", "group.num_blocks=null")
SPARSE_START = (*SPARSE, "distributed.expert_parallel_size=2", f"{ZERO}zero3.json")


class CutShortError(Exception):
    pass


def write_run(folder: Path, data: Path) -> Path:
    stage = {
        "max_steps": NUM_STEPS,
        "save_steps": SAVE_STEPS,
        "logging_steps": 1,
        "per_device_train_batch_size": 3,
        "train_batch_size": 13,
        "learning_rate": 3e-3,
        "warmup_ratio": 0.2,
        "lora": {"lora_dropout": 0.2},
    }
    config = {
        "output_dir": str(folder),
        "data": {"path": [str(data / "generated_tags"), str(data / "generated_ratings")]},
        "base": CONFIG["base"] | {"create": CONFIG["base"]["create"] | {"max_steps": 20}},
        "population": stage,
        "group": stage | {"num_experts": 4, "num_blocks": 2},
        "router": {"train_batch_size": 13},
        "distributed": {"num_ranks": 2, "deepspeed": str(REPO / "ds_configs/zero2.json")},
        "evaluation": {"methods": ["proper", "proper-released"]},
    }
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def train(path: str, stages: tuple[str, ...], cut_at: int, *overrides: str) -> None:
    """On the running ranks: the stages of a run, each cut short in its optimizer step `cut_at`."""
    config, ranks = load_config(path, overrides), current_ranks(1)
    whole_step = RankEngine.step
    for stage in stages:
        num_steps = 0

        def step(engine, batches, learning_rate):
            nonlocal num_steps
            if num_steps == cut_at:
                raise CutShortError
            num_steps += 1
            return whole_step(engine, batches, learning_rate)

        RankEngine.step = step
        try:
            run_stages(config, ranks, [[stage, "inputs", {}, {}]])
        except CutShortError:
            assert cut_at < NUM_STEPS
        finally:
            RankEngine.step = whole_step
        ranks.barrier()


def copy(folder: Path, name: str) -> Path:
    shutil.copytree(folder, folder.parent / name)
    return write_run(folder.parent / name, folder.parent / "data")


def whole_and_cut(path: str) -> None:
    """Everything undisturbed in one folder; its twin, each stage of which ends in the middle, in another.

    And the same of a group level with sparse routing, its experts spread over both ranks.
    """
    ranks, folder = current_ranks(1), Path(path).with_suffix("")
    train(path, STAGES[:1], NUM_STEPS)
    if ranks.is_first:
        config = load_config(path)
        RunFolder(folder).stage("features").begin("inputs")
        FeaturesJob(config, torch.device("cpu"), [""]).run(Unit(0, NUM_USERS, 1, "features", NUM_USERS))
        cut = copy(folder, "cut")
        (cut.with_suffix("") / "metrics.jsonl").unlink()
        for name in ("sparse-whole", "sparse-cut"):
            copy(folder, name)
    ranks.barrier()
    train(str(folder.with_name("sparse-whole.yaml")), SPARSE_STAGES, NUM_STEPS, *SPARSE_START)
    train(str(folder.with_name("sparse-cut.yaml")), SPARSE_STAGES, CUT_AT, *SPARSE_START)
    train(path, STAGES[1:], NUM_STEPS)
    train(str(folder.with_name("cut.yaml")), STAGES[1:], CUT_AT)
    if ranks.is_first:
        shutil.rmtree(folder.with_name("cut") / "population")
    ranks.barrier()
    train(str(folder.with_name("cut.yaml")), STAGES[:1], CUT_AT)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Beside each other: `whole`, a run that nothing disturbed, and `cut`, its twin whose stages were cut short.

    `sparse-whole` and `sparse-cut` likewise.
    """
    root = tmp_path_factory.mktemp("resume")
    proper_ds("data", "generate", "--users", str(NUM_USERS), "--groups", "3", "--seed", "5", "--out", root / "data")
    path = write_run(root / "whole", root / "data")
    proper_ds("run", path, "--steps", "prepare,base,tokens")
    run_ranks(whole_and_cut, 2, str(path))
    return root


def lines(folder: Path, stage: str) -> dict[int, dict]:
    """Of metrics, by step."""
    events, _ = read_events(folder / "metrics.jsonl")
    return {event["step"]: event for event in events if event["stage"] == stage and "step" in event}


def losses(folder: Path, stage: str) -> dict[int, float]:
    return {step: line["loss"] for step, line in lines(folder, stage).items()}


def num_texts(folder: Path, stage: str) -> dict[int, int]:
    return {step: line["gates"]["num_texts"] for step, line in lines(folder, stage).items() if "gates" in line}


@pytest.mark.parametrize(
    ("kind", "stages", "num_ranks", "zero", "overrides"),
    [
        ("", STAGES, 2, "zero2", ()),
        ("", STAGES, 1, "zero3", ("distributed.num_ranks=1",)),
        ("", STAGES, 4, "zero1", ("distributed.num_ranks=4", "distributed.expert_parallel_size=2")),
        ("sparse-", SPARSE_STAGES, 1, "zero2", (*SPARSE, "distributed.num_ranks=1")),
    ],
)
def test_a_stage_cut_short_goes_on_as_if_nothing_had_been(folders, kind, stages, num_ranks, zero, overrides):
    path = copy(folders / f"{kind}cut", f"{kind}on-{num_ranks}")
    folder, whole = path.with_suffix(""), folders / f"{kind}whole"
    for stage in stages:
        kept = (folder / stage / "checkpoint").glob("step-*")
        assert sorted(int(one.name.split("-")[1]) for one in kept) == [4, 8]
    run_ranks(train, num_ranks, str(path), stages, NUM_STEPS, f"{ZERO}{zero}.json", *overrides)
    for stage in stages:
        found, wanted = losses(folder, stage), losses(whole, stage)
        assert sorted(found) == sorted(wanted) == list(range(1, NUM_STEPS + 1))
        assert found == pytest.approx(wanted, abs=TOLERANCE), stage
        assert wanted[NUM_STEPS] < wanted[1], "the test must train something"
        counted = num_texts(folder, stage)
        assert counted == num_texts(whole, stage), "what a resume runs to warm up does not count"
        assert len(counted) == (NUM_STEPS if stage.startswith("group") else 0)
        result = Path(stage) / RESULTS.get(stage, "level.safetensors")
        values, expected = load_file(folder / result), load_file(whole / result)
        assert values.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(values[key], value, rtol=0, atol=TOLERANCE, msg=f"{stage} {key}")
        assert RunFolder(folder).stage(stage).inputs()["made_from"]["train_batch_size"] == 13
