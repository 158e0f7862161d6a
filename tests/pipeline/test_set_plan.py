"""Whom a night trains: decided anew each night, and only once in a night, however often it is resumed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from proper_ds.config import RunConfig
from proper_ds.model.lora import LoraLayout, ModuleShape
from proper_ds.observe.progress import ProgressView
from proper_ds.pipeline.run import Run
from proper_ds.pipeline.stage import Stage
from proper_ds.store.elsewhere import open_store
from proper_ds.training.set_plan import ensure_plan

LAYOUT = LoraLayout((ModuleShape("m", 2, 2),), r=1, lora_alpha=1)


@pytest.fixture
def night(tmp_path, monkeypatch):
    """`night(fingerprint, digests)`: begins an update with these histories by user; the plan of it."""
    monkeypatch.setattr("proper_ds.pipeline.run.StageList", lambda config: [])
    monkeypatch.setattr("proper_ds.training.set_plan.users_to_train", lambda c, roles: np.ones(len(c.keys), dtype=bool))
    run = Run(RunConfig(output_dir=str(tmp_path)), ProgressView(Console(quiet=True)))

    def begin(fingerprint, digests, is_update=True):
        stage = Stage("store/OPPU", "user", "fleet", {}, (), fingerprint, {}, is_update=is_update)
        run._begin(stage)
        held = list(digests.values())
        tokens = SimpleNamespace(num_users=len(held), history_digests=lambda start, stop: held[start:stop])
        context = SimpleNamespace(tokens=tokens, keys=list(digests))
        return ensure_plan(context, run.folder.stage("store/OPPU"), {"asked"})

    begin.folder = run.folder.stage("store/OPPU").path
    return begin


def train(night, plan, digests):
    store = open_store(night.folder)
    users = [user for user, chosen in zip(digests, plan.chosen, strict=True) if chosen]
    adapters = {user: torch.ones(LAYOUT.num_parameters) for user in users}
    losses = dict.fromkeys(users, (1, [1.0]))
    store.put_unit("unit-0", adapters, {}, losses, LAYOUT, "float32", version=plan.version, digests=digests)


def test_a_night_without_a_commit_leaves_no_plan_for_the_next(night):
    first = {"ann": "0a", "bob": "0b"}
    plan = night("a", first, is_update=False)
    assert (plan.version, plan.chosen.tolist()) == (1, [True, True])
    train(night, plan, first)
    assert not night("b", first).chosen.any(), "only questions changed"
    plan = night("c", {"ann": "0a", "bob": "1b", "cleo": "0c"})
    assert plan.chosen.tolist() == [False, True, True]
    assert plan.version == 3
    train(night, plan, {"ann": "0a", "bob": "1b", "cleo": "0c"})
    assert {user: open_store(night.folder).entry(user).version for user in ("ann", "bob", "cleo")} == {
        "ann": 1,
        "bob": 3,
        "cleo": 3,
    }


def test_a_resumed_night_keeps_its_plan_whatever_is_committed(night):
    first = {"ann": "0a", "bob": "0b"}
    train(night, night("a", first, is_update=False), first)
    changed = {"ann": "1a", "bob": "0b"}
    plan = night("b", changed)
    train(night, plan, changed)
    again = night("b", changed)
    assert (again.version, again.chosen.tolist()) == (plan.version, [True, False]) == (2, [True, False])
