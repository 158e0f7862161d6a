"""Giving up a unit: its users are failed with the reason, those without history are no part of it, commits stand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from proper_ds.config import RunConfig
from proper_ds.data.tokens import HISTORY
from proper_ds.fleet.plan import Unit
from proper_ds.model.lora import LoraLayout, ModuleShape
from proper_ds.pipeline.quarantine import give_up_unit
from proper_ds.run_folder import RunFolder
from proper_ds.store.store import AdapterStore
from proper_ds.training.set_plan import SetPlan

UNIT = Unit(1, 4, 10, "store/OPPU", 2)
PLAN = SetPlan(1, np.array([True, True, False, True, True]))


@pytest.fixture
def context(tmp_path):
    """Five users; the third of them never had a history."""
    return SimpleNamespace(
        config=RunConfig(output_dir=str(tmp_path)),
        folder=RunFolder(tmp_path),
        keys=list("abcde"),
        tokens=tokens_with_history_of([0, 1, 1, 3, 4]),
    )


def tokens_with_history_of(users):
    """The columns of TokenData that tell who has history: one item of each of the users, and a question of all."""
    columns = {
        "user": np.array([*users, *range(5)]),
        "kind": np.array([HISTORY] * len(users) + [HISTORY + 1] * 5),
    }
    blocks = [(0, 3), (3, len(columns["user"]))]
    column = lambda name, start, stop: columns[name][start:stop]  # noqa: E731
    return SimpleNamespace(column=column, num_users=5, blocks=lambda: blocks)


def test_users_of_a_unit_given_up_are_failed_and_the_unit_is_done(context):
    give_up_unit(context, UNIT, PLAN, "it kills its worker")
    store = AdapterStore(context.folder.stage("store/OPPU").path)
    assert store.failures() == {"b": "it kills its worker", "d": "it kills its worker"}
    assert store.users() == []
    assert store.units() == {UNIT.name}


def test_nobody_forgotten_since_the_plan_is_committed_as_failed(context):
    context.keys[1], context.tokens = "(forgotten user 1)", tokens_with_history_of([0, 3, 4])
    give_up_unit(context, UNIT, PLAN, "it kills its worker")
    store = AdapterStore(context.folder.stage("store/OPPU").path)
    assert set(store.failures()) == {"d"}
    assert store.units() == {UNIT.name}


def test_a_late_commit_of_the_unit_stands(context):
    store = AdapterStore(context.folder.stage("store/OPPU").path)
    layout = LoraLayout((ModuleShape("m", 2, 2),), r=1, lora_alpha=1)
    adapters = {key: torch.ones(layout.num_parameters) for key in "bd"}
    store.put_unit(UNIT.name, adapters, {}, dict.fromkeys("bd", (1, [1.0])), layout, "float32")
    give_up_unit(context, UNIT, PLAN, "it was thought lost")
    store.refresh()
    assert store.failures() == {}
    assert store.users() == ["b", "d"]


def test_a_unit_given_up_in_an_update_leaves_the_adapters_there_were(context):
    store = AdapterStore(context.folder.stage("store/OPPU").path)
    layout = LoraLayout((ModuleShape("m", 2, 2),), r=1, lora_alpha=1)
    adapters = {key: torch.ones(layout.num_parameters) for key in "bd"}
    digests = dict.fromkeys("bd", "00")
    store.put_unit(UNIT.name, adapters, {}, dict.fromkeys("bd", (1, [1.0])), layout, "float32", digests=digests)
    give_up_unit(context, UNIT, SetPlan(2, PLAN.chosen), "it kills its worker")
    store.refresh()
    assert store.users() == ["b", "d"]
    assert [(entry.version, entry.status, entry.digest) for entry in store.history("b")] == [
        (1, "stored", "00"),
        (2, "failed", ""),
    ]
