"""PPlug and PLoRA on two ranks equal one plain process at every ZeRO stage, and go on from each other's checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from proper_ds.data.batches import collate
from proper_ds.distributed.apart import AdamSettings
from proper_ds.distributed.ds_config import resolve_ds
from proper_ds.distributed.ranks import current_ranks
from proper_ds.distributed.user_table import NAME, ShardedTable
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.config import LoraSettings
from proper_ds.model.lora import LoraLayout
from proper_ds.model.persona import Persona, PersonaInputs, PersonaSizes
from proper_ds.model.plora import PersonalLoras
from proper_ds.training.config import PloraConfig
from proper_ds.training.persona_inputs import with_personal
from proper_ds.training.plora import PloraModule
from proper_ds.training.pplug import PplugModule
from proper_ds.training.rank_batch import RankBatch
from tests.distributed.gang import run_ranks
from tests.distributed.steps import train_steps
from tests.fakes import random_examples, tiny_llama

NUM_STEPS, NUM_PARTS, PER_PART, NUM_USERS, SIZE = 4, 4, 2, 6, 5
RATE, RATIO = 4e-3, 2.5
SETTINGS = PloraConfig(learning_rate=RATE, max_grad_norm=0.5, weight_decay=0.1, per_device_train_batch_size=PER_PART)
TARGETS = ["q_proj", "down_proj"]


def make_module(kind, table):
    lm = tiny_llama()
    if kind == "pplug":
        return PplugModule(PersonalModel(lm, {}), Persona(PersonaSizes(SIZE, 32, 0.3, 0.8), seed=3))
    targets = find_targets(lm, TARGETS)
    layout = LoraLayout.of(targets, LoraSettings(r=2, target_modules=TARGETS))
    shared = PersonalLoras(layout, SIZE, seed=3)
    for number, lora in enumerate(shared.loras):  # else users' vectors have no gradient in the first step
        generator = torch.Generator().manual_seed(number)
        lora.lora_B.data.normal_(0, 0.1, generator=generator)
    return PloraModule(PersonalModel(lm, targets), shared, 0.0, 0.3, table)


def make_batch(kind, step, part):
    """Part `part` of step `step`; the last part of the third step has no example, as at an epoch's end."""
    parts = [random_examples(PER_PART, 100 * step + p, seed=8) for p in range(NUM_PARTS)]
    if step == 2:
        parts[-1] = []
    num_rows = sum(len(p) for p in parts)
    num_targets = sum(e.num_targets for p in parts for e in p)
    weight = 1.0 if parts[part] else 0.0
    examples = parts[part] or parts[0][:1]
    generator = torch.Generator().manual_seed(step * 10 + part)
    if kind == "pplug":
        made = RankBatch(collate([with_personal(e) for e in examples]), weight, num_targets, num_rows)
        shape = (len(examples), 3, SIZE)
        keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
        is_item = torch.arange(3) < torch.randint(0, 4, (len(examples), 1), generator=generator)
        made.persona = PersonaInputs(torch.randn(len(examples), SIZE, generator=generator), keys, values, is_item)
        return made
    made = RankBatch(collate(examples), weight, num_targets, num_rows)
    made.line_R = torch.randint(0, 1 + NUM_USERS, (len(examples),), generator=generator) * int(weight)
    return made


def train_plain(kind):
    """One process, torch's AdamW with one optimizer a line: (cross-entropy by step, weights, table)."""
    lines = [torch.nn.Parameter(torch.zeros(SIZE)) for _ in range(1 + NUM_USERS)]
    module = make_module(kind, lambda line_R: torch.stack([*(lines[n] for n in line_R), torch.zeros(SIZE)])[:-1])
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    shared = torch.optim.AdamW(named.values(), lr=RATE, weight_decay=SETTINGS.weight_decay)
    options = {"lr": RATE * RATIO, "weight_decay": SETTINGS.weight_decay}
    own = [torch.optim.AdamW([line], **options) for line in lines]
    losses = []
    for step in range(NUM_STEPS):
        ce = 0.0
        for part in range(NUM_PARTS):
            loss, numbers = module(make_batch(kind, step, part))
            loss.backward()
            ce += float(numbers["ce"])
        torch.nn.utils.clip_grad_norm_([*named.values(), *lines], SETTINGS.max_grad_norm)
        for optimizer in (shared, *own):  # lines without a gradient are left alone
            optimizer.step()
            optimizer.zero_grad()
        losses.append(ce)
    return losses, {name: p.detach().clone() for name, p in named.items()}, torch.stack(lines).detach()


def train_ranks(kind, zero, start, stop, folder):
    """On the running ranks, from the checkpoint in `folder` unless `start` is 0; (losses, all weights)."""
    ranks = current_ranks(1)
    accumulation = NUM_PARTS // ranks.num_ranks
    settings = SETTINGS.model_copy(update={"gradient_accumulation_steps": accumulation})
    raw = {"zero_optimization": {"stage": zero} | ({"stage3_param_persistence_threshold": 0} if zero == 3 else {})}
    ds_config, problems = resolve_ds(raw, "plora", settings, ranks.num_ranks, bf16=False, hidden_size=32)
    assert not problems
    apart = []
    if kind == "plora":
        own = {"spread": 0.0, "rate_ratio": RATIO}
        apart.append(ShardedTable(1 + NUM_USERS, SIZE, 0, ranks, AdamSettings.of(ds_config), **own))
    module = make_module(kind, apart[0] if apart else None)

    def batches_of(step):
        return [make_batch(kind, step, a * ranks.num_ranks + ranks.rank) for a in range(accumulation)]

    return train_steps(module, ds_config, ranks, Path(folder), range(start, stop), batches_of, RATE, apart)


def all_stages(kind, stages, folder):
    """Each ZeRO stage from scratch, the last in two halves of which the first is of the first stage."""
    found = [train_ranks(kind, zero, 0, NUM_STEPS, f"{folder}/{zero}") for zero in stages]
    first, _ = train_ranks(kind, stages[0], 0, 2, f"{folder}/halves")
    second, weights = train_ranks(kind, stages[-1], 2, NUM_STEPS, f"{folder}/halves")
    return [*found, (first + second, weights)]


@pytest.mark.parametrize("kind", ["pplug", "plora"])
def test_two_ranks_equal_one_process_at_every_zero_stage(kind, tmp_path):
    losses, weights, table_LU = train_plain(kind)
    if kind == "plora":
        weights[NAME] = table_LU
        assert table_LU[1:].abs().max() > 1e-3, "the test must train vectors"
        assert not table_LU[0].any(), "the generic user's is zero"
    for results in run_ranks(all_stages, 2, kind, [0, 1, 2, 3], str(tmp_path)):
        for found_losses, found in results:
            assert found_losses == pytest.approx(losses, abs=1e-4)
            assert found.keys() == weights.keys()
            for name, wanted in weights.items():
                assert np.abs(found[name].numpy() - wanted.numpy()).max() < 1e-5, name
