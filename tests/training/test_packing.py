"""Packed rows hold every text once, and losses and gradients are those of each text in a row of its own."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proper_ds.data.batches import collate, first_fit_decreasing
from proper_ds.data.tokens import HISTORY, Example
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.config import LoraSettings
from proper_ds.model.groups import GroupLevel, GroupSizes
from proper_ds.model.lora import LoraLayout
from proper_ds.model.masks import text_mask
from proper_ds.model.presets import PRESETS
from proper_ds.model.routing import Rows
from proper_ds.training.group_module import GroupModule
from proper_ds.training.population import PopulationModule
from proper_ds.training.rank_batch import RankBatch, dropout_keys
from tests.fakes import random_examples, tiny_llama

TARGETS = ["q_proj", "v_proj", "down_proj"]
TEXTS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 3)), min_size=1, max_size=9)


def texts(shapes):
    """Examples with so many prompt and answer tokens, no token like another."""
    first = np.cumsum([0, *(sum(shape) for shape in shapes)])
    return [
        Example(n, HISTORY, 0, n, num_prompt, first[n] + np.arange(num_prompt + num_targets))
        for n, (num_prompt, num_targets) in enumerate(shapes)
    ]


@given(TEXTS)
def test_each_target_sees_its_own_text_and_nothing_else(shapes):
    examples = texts(shapes)
    packed = collate(examples, packing=True)
    assert packed.ids_RT.shape[1] == max(len(e.ids) for e in examples)
    assert packed.length_R.tolist() == packed.mask_RT.sum(1).tolist()
    assert packed.length_R.sum() == sum(len(e.ids) for e in examples)
    if packed.text_RT is None:
        assert torch.equal(packed.ids_RT, collate(examples).ids_RT)
        return
    seen_RTT = text_mask(packed.text_RT, torch.float32).squeeze(1) == 0
    assert seen_RTT.any(-1).all(), "attention over nothing is not a number"
    found = []
    for row, column, target in zip(packed.row_K, packed.position_K, packed.target_K, strict=True):
        seen_T = seen_RTT[row, column]
        places = packed.place_RT[row][seen_T].tolist()
        assert places == list(range(len(places)))
        found.append((packed.ids_RT[row][seen_T].tolist(), int(target)))
    wanted = [(e.ids[:at].tolist(), int(e.ids[at])) for e in examples for at in range(e.num_prompt, len(e.ids))]
    assert found == wanted, "targets come in the order of the examples"
    for number, example in enumerate(examples):
        assert packed.ids_RT[packed.text_RT == number].tolist() == example.ids.tolist()


@given(st.lists(st.integers(1, 40), max_size=50))
def test_rows_are_full_enough(lengths):
    width = max(lengths, default=1)
    rows = first_fit_decreasing(lengths, width)
    assert sorted(text for row in rows for text in row) == list(range(len(lengths)))
    filled = [sum(lengths[text] for text in row) for row in rows]
    assert all(tokens <= width for tokens in filled)
    if len(filled) > 1:
        assert min(a + b for n, a in enumerate(filled) for b in filled[:n]) > width, "no two rows fit into one"


def population(lm, targets, layout, dropout):
    return PopulationModule(PersonalModel(lm, targets), layout, dropout, seed=3)


def group(preset, top_k, lm, targets, layout, dropout):
    summed = preset == "proper"
    sizes = GroupSizes(3, top_k, feature_size=7, user_vector_size=5 if summed else 0, num_users=9)
    level = GroupLevel(layout, PRESETS[preset], sizes, seed=1)
    module = GroupModule(PersonalModel(lm, targets), level, dropout, 0.05, 0.05)
    module.experts = level.experts  # no submodule by itself: it is trained apart
    return module


KINDS = {
    "population": population,
    "group": partial(group, "proper", None),
    "top-2": partial(group, "proper", 2),
    "released": partial(group, "proper-released", None),
}


def losses_and_gradients(kind, packing, dtype, dropout):
    lm = tiny_llama(dtype=dtype)
    targets = find_targets(lm, TARGETS)
    layout = LoraLayout.of(targets, LoraSettings(r=2, target_modules=TARGETS))
    module = KINDS[kind](lm, targets, layout, dropout)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in module.named_parameters():
        if name.endswith("lora_B"):  # else it is zero, and A has no gradient
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    module.to(dtype)
    batch = collate([e for user in range(3) for e in random_examples(3, user, seed=2, longest=40)], packing=packing)
    assert (batch.text_RT is not None) == packing
    rows = Rows(text_RT=batch.text_RT, key_R=dropout_keys(5, 6, batch) if dropout else None)
    made = RankBatch(batch, 1.0, 20, 9, rows)
    users = torch.tensor([example.user for example in batch.examples])
    made.features_RF = torch.randn(3, 7, generator=generator)[users].to(dtype)
    made.known_R, made.line_R = users > 0, users
    loss, numbers = module(made)
    loss.backward()
    return numbers | {"loss": loss.detach()}, {n: p.grad for n, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_teach_the_same(kind, dtype, tolerance, dropout):
    numbers, gradients = losses_and_gradients(kind, False, dtype, dropout)
    packed_numbers, packed_gradients = losses_and_gradients(kind, True, dtype, dropout)
    for name, value in numbers.items():
        assert float(packed_numbers[name]) == pytest.approx(float(value), rel=max(tolerance, 1e-6)), name
    assert float(packed_numbers["loss"]) == pytest.approx(float(numbers["loss"]), rel=tolerance)
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert scale > 1e-3
    for name, plain in gradients.items():
        assert (plain - packed_gradients[name]).abs().max() < tolerance * max(1.0, scale), name
