"""The step that has a model write profiles: its units, what is committed already, and what its stage depends on."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from proper_ds.config import load_config
from proper_ds.evaluation.methods import methods_of
from proper_ds.fleet.plan import plan_units
from proper_ds.pipeline.stages import StageList
from proper_ds.pipeline.steps import TOKENS_PER_PROFILE, Steps
from proper_ds.training.context import RunContext
from proper_ds.training.profiles import ProfilesJob
from tests.end_to_end.runs import CONFIG
from tests.training.test_profiles import model_folder  # noqa: F401 - a fixture


@pytest.fixture
def load(tmp_path, lamp_folder, model_folder):  # noqa: F811
    """`load(*overrides)`: a run with two recipes of profiles by a model."""
    questions = [
        {"id": str(n), "input": "review: new", "user_id": f"u{n}", "profile": [{"id": "1", "text": "a", "score": "3"}]}
        for n in range(5)
    ]
    golds = [{"id": str(n), "output": "3"} for n in range(5)]
    for split in ("train", "dev"):
        own = [q | {"id": f"{split}{q['id']}", "user_id": f"{split}{q['user_id']}"} for q in questions]
        data = lamp_folder(own, [g | {"id": f"{split}{g['id']}"} for g in golds], split, "LaMP_3")
    written = {"profile": "model", "profile_model": str(model_folder)}
    recipes = {
        name: {"like": "PAG", "prompt": written | {"profile_max_new_tokens": room}}
        for name, room in (("short", 4), ("long", 6))
    }
    config = CONFIG | {
        "output_dir": str(tmp_path / "run"),
        "data": {"path": [str(data)]},
        "fleet": {"num_tokens_per_unit": 2 * TOKENS_PER_PROFILE},
        "evaluation": {"methods": ["population", "short", "long"]},
        "recipes": recipes,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in config.items() if k not in ("group", "user", "router")}))
    return lambda *overrides: load_config(path, overrides)


def test_units_of_both_recipes_are_written_and_those_there_are_left_alone(load, monkeypatch):
    config = load()
    context, stages = RunContext(config, torch.device("cpu")), StageList(config)
    steps = Steps(context, SimpleNamespace(report=lambda *_: None), lambda: None, {})
    steps.do(stages.of("prepare"))
    asked = []
    monkeypatch.setattr(steps, "_fleet", lambda *args: asked.append(args))
    steps.do(stages.of("profiles"))
    ((entry, options, step, every, pending),) = asked
    lanes = [method.lane for method in methods_of(config) if method.lane]
    assert (entry, step) == ("proper_ds.training.profiles:ProfilesJob", "profiles")
    assert [unit.part for unit in every] == [f"profiles@{lane}" for lane in lanes for _ in range(5)]
    assert pending == every
    assert every[:5] == plan_units(np.full(10, TOKENS_PER_PROFILE), 2 * TOKENS_PER_PROFILE, f"profiles@{lanes[0]}")
    job = ProfilesJob(config, torch.device("cpu"), options["recipes"])
    for unit in (every[0], every[7]):
        assert job.run(unit)["num_texts"] == 2
    steps.do(stages.of("profiles"))
    assert [unit for unit in every if unit not in asked[-1][4]] == [every[0], every[7]]


def test_profiles_depend_on_the_type_that_their_model_runs_in(load):
    def prints(*overrides):
        return [stage.fingerprint for stage in StageList(load(*overrides)).of("profiles")]

    assert len(set(prints())) == 2
    assert prints("base.dtype=bfloat16")[0] != prints("base.dtype=float32")[0]
    assert prints("base.max_length=90") == prints(), "and on nothing of the base"
