"""The learned start on two ranks equals one plain process at every ZeRO stage that it may have."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from proper_ds.data.batches import collate
from proper_ds.distributed.ds_config import resolve_ds
from proper_ds.distributed.ranks import current_ranks
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.config import LoraSettings
from proper_ds.model.lora import LoraLayout
from proper_ds.training.config import StartConfig, UserConfig
from proper_ds.training.slots import UserTask
from proper_ds.training.start import StartBatch, StartModule
from tests.distributed.gang import run_ranks
from tests.distributed.steps import train_steps
from tests.fakes import random_examples, tiny_llama

NUM_STEPS, NUM_PARTS, RATE = 4, 4, 5e-3
SETTINGS = StartConfig(learning_rate=RATE, max_grad_norm=0.5, per_device_train_batch_size=2)
USER = UserConfig(lora=LoraSettings(r=2, target_modules=["q_proj", "down_proj"]), learning_rate=5e-3, num_slots=2)


def make_module():
    lm = tiny_llama()
    targets = find_targets(lm, USER.lora.target_modules)
    return StartModule(PersonalModel(lm, targets), LoraLayout.of(targets, USER.lora), SETTINGS, USER, seed=3)


def make_batch(step, part):
    """Two users; the last part of the third step has none, as at an epoch's end."""
    count = 2 * NUM_PARTS - (2 if step == 2 else 0)
    users = [100 * step + 2 * part + n for n in range(2)]
    tasks = [UserTask(f"u{user}", random_examples(1 + user % 3, user, seed=8)) for user in users]
    questions = [random_examples(1 + user % 2, user, seed=9) for user in users]
    batch = collate([own[0] for own in questions])
    if step == 2 and part == NUM_PARTS - 1:
        return StartBatch(batch, 0.0, count, count)
    return StartBatch(batch, 1.0, count, count, tasks=tasks, questions=questions, seed=step)


def train_plain():
    """(summed losses by step, weights) by torch's AdamW in one process."""
    module = make_module()
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=RATE, weight_decay=0.0)
    losses = []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        ce = 0.0
        for part in range(NUM_PARTS):
            loss, numbers = module(make_batch(step, part))
            loss.backward()
            ce += float(numbers["ce"])
        torch.nn.utils.clip_grad_norm_(list(named.values()), SETTINGS.max_grad_norm)
        optimizer.step()
        losses.append(ce)
    return losses, {name: p.detach().clone() for name, p in named.items()}


def train_ranks(zero, start, stop, folder):
    """On the running ranks, from the checkpoint in `folder` unless `start` is 0; (losses, weights)."""
    ranks = current_ranks(1)
    accumulation = NUM_PARTS // ranks.num_ranks
    settings = SETTINGS.model_copy(update={"gradient_accumulation_steps": accumulation})
    raw = {"zero_optimization": {"stage": zero}}
    ds_config, problems = resolve_ds(raw, "start", settings, ranks.num_ranks, bf16=False, hidden_size=32)
    assert not problems

    def batches_of(step):
        return [make_batch(step, a * ranks.num_ranks + ranks.rank) for a in range(accumulation)]

    return train_steps(make_module(), ds_config, ranks, folder, range(start, stop), batches_of, RATE)


def all_stages(folder):
    """Each ZeRO stage from scratch, and 2 then 0 in two halves."""
    found = [train_ranks(zero, 0, NUM_STEPS, folder / str(zero)) for zero in (0, 2)]
    first, _ = train_ranks(2, 0, 2, folder / "halves")
    second, weights = train_ranks(0, 2, NUM_STEPS, folder / "halves")
    return [*found, (first + second, weights)]


def test_two_ranks_equal_one_process_at_every_zero_stage(tmp_path):
    losses, weights = train_plain()
    assert weights["log_factor_M"].abs().max() > RATE, "the test must train step sizes"
    for results in run_ranks(all_stages, 2, tmp_path):
        for found_losses, found in results:
            assert found_losses == pytest.approx(losses, abs=1e-4)
            assert found.keys() == weights.keys()
            for name, wanted in weights.items():
                assert np.abs(found[name].numpy() - wanted.numpy()).max() < 1e-5, name
