"""Users' adapters trained on ranks together with a shared router equal a plain loop with an optimizer for each user."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from proper_ds.data.batches import collate
from proper_ds.distributed.apart import AdamSettings
from proper_ds.distributed.checkpoint import Checkpoints
from proper_ds.distributed.ds_config import resolve_ds
from proper_ds.distributed.engine import RankEngine
from proper_ds.distributed.ranks import current_ranks
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.config import FEED_FORWARD, LoraSettings
from proper_ds.model.groups import GroupLevel, GroupSizes
from proper_ds.model.lora import LoraLayout, SlotBuffers
from proper_ds.model.presets import PRESETS
from proper_ds.model.routing import Rows
from proper_ds.training.config import JointConfig
from proper_ds.training.group_module import GroupModule
from proper_ds.training.rank_batch import RankBatch
from proper_ds.training.rank_stage import load_trained
from proper_ds.training.user_rows import NAME, UserRows, users_per_rank
from tests.distributed.gang import run_ranks
from tests.fakes import random_examples, tiny_llama

USERS = np.asarray([2, 3, 5, 7, 11])
STEPS = [[2, 3, 7], [3, 5], [11, 2, 2, 2], [5], [2, 3, 5, 7, 11, 11], [7, 3]]
RATE, RATIO = 4e-3, 2.5
SETTINGS = JointConfig(learning_rate=RATE, max_grad_norm=0.05, weight_decay=0.1)


def start_of(layout, users):
    """An adapter for each user that has an effect from the start."""
    rows = [torch.randn(layout.num_parameters, generator=torch.Generator().manual_seed(int(user))) for user in users]
    return torch.stack(rows) * 0.1


def make():
    lm = tiny_llama()
    targets = find_targets(lm, FEED_FORWARD)
    layout = LoraLayout.of(targets, LoraSettings(r=2, target_modules=FEED_FORWARD))
    level = GroupLevel(layout, PRESETS["proper"], GroupSizes(3, feature_size=7, user_vector_size=5), 1)
    generator = torch.Generator().manual_seed(9)
    for _, b_NEr in level.expert_weights():
        b_NEr.copy_(torch.randn(b_NEr.shape, generator=generator) * 0.2)
    level.requires_grad_(False)
    level.add_lora_routers(4)
    model = PersonalModel(lm, targets)
    return model, layout, GroupModule(model, level, 0.0, 0.0, 0.0)


def make_batch(step, users):
    """The step's examples of these users; a stand-in that weighs nothing where there are none."""
    chosen = [(n, user) for n, user in enumerate(STEPS[step]) if user in users]
    everyone = [random_examples(1, 100 * step + n, seed=8)[0] for n in range(len(STEPS[step]))]
    examples = [everyone[n] for n, _ in chosen] or everyone[:1]
    for example, (_, user) in zip(examples, chosen or [(0, STEPS[step][0])], strict=True):
        object.__setattr__(example, "user", user)
    num_targets = sum(example.num_targets for example in everyone)
    features = torch.randn(len(examples), 7, generator=torch.Generator().manual_seed(3)) * 0
    known = torch.zeros(len(examples), dtype=torch.bool)
    weight = 1.0 if chosen else 0.0
    return RankBatch(collate(examples), weight, num_targets, len(everyone), Rows(), features, known)


def train_plain():
    """(cross-entropy by step, adapters, router weights): every user with a torch.optim.AdamW of their own."""
    model, layout, module = make()
    slots = SlotBuffers(layout, len(USERS), torch.float32, "cpu", trainable=True)
    model.attach_users(slots.modules())
    slots.weights_SP.copy_(start_of(layout, USERS))
    rows = [torch.nn.Parameter(row.clone()) for row in slots.weights_SP]
    options = {"lr": RATE * RATIO, "weight_decay": SETTINGS.weight_decay}
    optimizers = [torch.optim.AdamW([row], **options) for row in rows]
    routers = {name: p for name, p in module.named_parameters() if p.requires_grad}
    shared = torch.optim.AdamW(routers.values(), lr=RATE, weight_decay=SETTINGS.weight_decay)
    losses = []
    for step, users in enumerate(STEPS):
        made = make_batch(step, set(users))
        made.rows.slot_R = torch.from_numpy(np.searchsorted(USERS, [e.user for e in made.examples]))
        loss, numbers = module(made)
        loss.backward()
        losses.append(float(numbers["ce"]))
        torch.nn.utils.clip_grad_norm_(routers.values(), SETTINGS.max_grad_norm)
        shared.step()
        shared.zero_grad()
        for user in set(users):
            place = int(np.searchsorted(USERS, user))
            own = sum(example.num_targets for example in made.examples if example.user == user)
            rows[place].grad = slots.grads_SP[place] * made.num_targets / own
            torch.nn.utils.clip_grad_norm_([rows[place]], SETTINGS.max_grad_norm)
            optimizers[place].step()
            slots.weights_SP[place] = rows[place].detach()
        slots.grads_SP.zero_()
    return losses, slots.weights_SP, {name: p.detach().clone() for name, p in routers.items()}


def train_ranks(zero, start, stop, folder):
    """On the running ranks, from the checkpoint in `folder` unless `start` is 0; (losses, rows, router weights)."""
    ranks = current_ranks(1)
    model, layout, module = make()
    raw = {"zero_optimization": {"stage": zero} | ({"stage3_param_persistence_threshold": 0} if zero == 3 else {})}
    ds_config, problems = resolve_ds(raw, "joint", SETTINGS, ranks.num_ranks, bf16=False)
    assert not problems
    checkpoints = Checkpoints(Path(folder), "inputs", 1)
    checkpoint = checkpoints.latest(ranks) if start else None
    if checkpoint is not None:
        load_trained(module, checkpoint.tensors)
    rows = UserRows(
        model,
        layout,
        USERS,
        lambda users: start_of(layout, users),
        ranks,
        AdamSettings.of(ds_config),
        max_grad_norm=SETTINGS.max_grad_norm,
        rate_ratio=RATIO,
        dropout=0.0,
    )
    engine = RankEngine(module, ds_config, ranks, [rows])
    share = users_per_rank(len(USERS), ranks.num_ranks)
    mine = set(USERS[ranks.rank * share : (ranks.rank + 1) * share].tolist())
    losses = []
    for step in range(start, stop):
        made = make_batch(step, mine)
        made.rows.slot_R = torch.tensor(rows.seat(made.examples, made.num_targets, counts=bool(made.weight)))
        if checkpoint is not None:
            engine.restore(checkpoint, made)
            checkpoint = None
        losses.append(ranks.sum([engine.step([made], RATE)["ce"]])[0])
    checkpoints.save(stop, engine.state(), engine.shards(), {}, ranks)
    engine.close()
    last = checkpoints.latest(ranks)
    return losses, last.rows(NAME, 0, len(USERS)), last.weights()


def some_stages(folder):
    """Whole runs at two ZeRO stages, and the first half of one."""
    whole = [train_ranks(zero, 0, len(STEPS), f"{folder}/{zero}") for zero in (2, 3)]
    return [*whole, train_ranks(0, 0, 3, f"{folder}/half")]


def second_half(folder):
    return train_ranks(2, 3, len(STEPS), f"{folder}/half")


def compare(found, wanted):
    losses, rows, routers = wanted
    assert found[0] == pytest.approx(losses, abs=1e-4)
    assert (found[1] - rows).abs().max() < 1e-5
    assert found[2].keys() == routers.keys()
    for name, weight in routers.items():
        assert (found[2][name] - weight).abs().max() < 1e-5, name


def test_two_ranks_equal_a_loop_with_an_optimizer_for_each_user_and_resume_on_one(tmp_path):
    wanted = train_plain()
    moved = (wanted[1] - start_of(make()[1], USERS)).abs().amax(1)
    assert moved.min() > 1e-3, "every user must learn something"
    for zero_2, zero_3, _ in run_ranks(some_stages, 2, str(tmp_path)):
        compare(zero_2, wanted)
        compare(zero_3, wanted)
    ((losses, rows, routers),) = run_ranks(second_half, 1, str(tmp_path))
    compare((wanted[0][:3] + losses, rows, routers), wanted)
    assert losses == pytest.approx(wanted[0][3:], abs=1e-4)
