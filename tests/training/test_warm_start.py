"""A warm start begins at the given adapter, with fresh moments and a schedule from its first step."""

from __future__ import annotations

from dataclasses import replace

import torch

from proper_ds.files import seed_of
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.config import LoraSettings
from proper_ds.model.lora import LoraLayout
from proper_ds.training.config import UserConfig
from proper_ds.training.slots import UserTask
from proper_ds.training.users import train_users
from tests.fakes import random_examples, tiny_llama

SEED = 3


def train(tasks, **changes):
    settings = UserConfig(lora=LoraSettings(r=2, target_modules=["q_proj", "v_proj"]), **changes)
    lm = tiny_llama()
    targets = find_targets(lm, settings.lora.target_modules)
    layout = LoraLayout.of(targets, settings.lora)
    return layout, train_users(PersonalModel(lm, targets), layout, tasks, settings, SEED)


def test_it_starts_where_it_is_told():
    tasks = [UserTask(f"u{n}", random_examples(3 + n, n, seed=4)) for n in range(3)]
    _, first = train(tasks, learning_rate=1e-2, num_train_epochs=3)
    warm = [replace(task, initial_row_P=result.row_P) for task, result in zip(tasks, first, strict=True)]
    _, stood = train(warm, learning_rate=1e-30)
    for before, after in zip(first, stood, strict=True):
        assert after.row_P.equal(before.row_P)
    _, on = train(warm, learning_rate=1e-2)
    for before, after in zip(first, on, strict=True):
        assert after.losses[0] < before.losses[0], "what was learned is still there"
        assert not after.row_P.equal(before.row_P)


def test_the_seeded_row_given_is_the_seeded_start():
    task = UserTask("u", random_examples(5, 1, seed=4))
    layout, cold = train([task], learning_rate=1e-2)
    row_P = layout.initial_row(seed_of(SEED, "user", "u"), torch.float32)
    _, told = train([replace(task, initial_row_P=row_P)], learning_rate=1e-2)
    assert told[0].losses == cold[0].losses
    assert told[0].row_P.equal(cold[0].row_P)
