"""The actors' job of answering: what its seconds count, what it keeps on the device; who answers without an adapter."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from proper_ds.config import RunConfig
from proper_ds.data.tokens import QUERY, Example
from proper_ds.evaluation import adapters, predict_job
from proper_ds.evaluation.adapters import AdapterAnswers
from proper_ds.evaluation.methods import METHODS
from proper_ds.evaluation.predict_job import PredictJob
from proper_ds.model.user_start import START, UserStart
from proper_ds.run_folder import RunFolder
from proper_ds.store.elsewhere import open_store
from tests.store.stores import LAYOUT, put, rows
from tests.training.test_anchors import tokens_of


class Clock:
    """Seconds that pass where a test says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class Slow:
    """An addition that takes time at everything."""

    num_experts = 0
    alive = 0

    def __init__(self, clock):
        self.clock = clock
        clock.now += 100
        Slow.alive += 1
        Slow.most = max(getattr(Slow, "most", 0), Slow.alive)

    def __del__(self):
        Slow.alive -= 1

    def attach(self, model):
        self.clock.now += 1

    def detach(self, model):
        self.clock.now += 1


@pytest.fixture
def job(tmp_path, monkeypatch):
    clock, made = Clock(), PredictJob.__new__(PredictJob)

    def spend(seconds, value=None):
        clock.now += seconds
        return value

    monkeypatch.setattr(predict_job, "time", clock)
    monkeypatch.setattr(predict_job, "addition_of", lambda method, context: Slow(clock))
    monkeypatch.setattr(predict_job, "write_answers", lambda *_: spend(1000))
    prepared = SimpleNamespace(manifest=SimpleNamespace(tasks={"t": None}))
    context = SimpleNamespace(prepared=prepared, folder=RunFolder(tmp_path))
    made._by_part = {f"predictions/{name}": method for name, method in METHODS.items()}
    made._model = made._addition = None
    made._lanes = SimpleNamespace(context=lambda lane: context, wear=lambda lane: spend(100))
    asked = [SimpleNamespace(example=SimpleNamespace(task=0), prompt=[1, 2])]
    made._questions_of = lambda context, unit, with_own: spend(100, asked)
    made._answer = lambda context, addition, task, prior, questions: spend(4, [{"task": "t"} for _ in questions])
    return made


def unit(method):
    return SimpleNamespace(part=f"predictions/{method}", name="unit-0")


def test_seconds_of_answering_begin_when_everything_is_loaded(job):
    report = job.run(unit("OPPU"))
    assert (report["num_questions"], report["answering_seconds"]) == (1, 6)
    assert report["seconds"] == 1306


def test_one_methods_addition_is_kept_at_a_time(job):
    Slow.most = Slow.alive = 0
    for method in ("OPPU", "OPPU", "proper", "PPlug"):
        job.run(unit(method))
    assert Slow.most == Slow.alive == 1, "its experts and slots take room on the device"


@pytest.fixture
def context(tmp_path):
    """User 0 has an adapter, user 1 failed, user 2 has no history."""
    folder = RunFolder(tmp_path)
    store = open_store(folder.stage("store/OPPU").path)
    put(store, "unit-0", {"a": rows(1)[0]})
    return SimpleNamespace(
        config=RunConfig.model_validate({"output_dir": str(tmp_path)}),
        device=torch.device("cpu"),
        tokens=tokens_of([(2, ["dev"]), (1, ["dev"]), (0, ["dev"])]),
        keys=["a", "b", "c"],
        stage=folder.stage,
    )


def asked(*users):
    return [Example(user, QUERY, 0, 0, 3, np.asarray([5, 6, 7])) for user in users]


def test_users_without_an_adapter_are_answered_by_the_learned_start(context):
    start_P = torch.randn(LAYOUT.num_parameters)
    UserStart(LAYOUT, start_P, torch.ones(2 * len(LAYOUT.modules)), 1.0).save(
        context.stage("start/OPPU").path / START, "start"
    )
    for learned in (False, True):
        if learned:
            raw = {"user": {"start": "learned"}, "start": {"adapter_sets": ["OPPU"]}}
            context.config = RunConfig.model_validate({"output_dir": "x"} | raw)
        answers = AdapterAnswers(METHODS["OPPU"], context)
        for _ in range(2):  # slots are used again
            found, personal = answers.rows(asked(1, 0, 2))
            assert personal == [False, True, False]
            served_RP = answers._slots.weights_SP[found.slot_R]
            wanted_P = start_P if learned else torch.zeros_like(start_P)
            assert torch.allclose(served_RP, torch.stack([wanted_P, rows(1)[0], wanted_P]), atol=1e-2)


def test_a_set_that_nobody_could_be_trained_for_is_answered_by_its_start(context, monkeypatch):
    start = UserStart(LAYOUT, torch.ones(LAYOUT.num_parameters), torch.ones(2 * len(LAYOUT.modules)), 1.0)
    monkeypatch.setattr(adapters, "load_start", lambda context, name: start)
    raw = {"user": {"start": "learned"}, "start": {"adapter_sets": ["OPPU"]}}
    context.config = RunConfig.model_validate({"output_dir": "x"} | raw)
    store = open_store(context.stage("store/OPPU").path)
    store.forget(["a"])
    answers = AdapterAnswers(METHODS["OPPU"], context)
    found, personal = answers.rows(asked(0, 1))
    assert personal == [False, False]
    assert answers._slots.weights_SP[found.slot_R].eq(1).all()
