"""Packed rows hold every text once, and losses and gradients are those of each text in a row of its own."""

from __future__ import annotations

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
from proper_ds.model.lora import LoraLayout
from proper_ds.model.masks import text_mask
from proper_ds.model.routing import Rows
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


def losses_and_gradients(packing, dtype, dropout):
    lm = tiny_llama(dtype=dtype)
    targets = find_targets(lm, TARGETS)
    layout = LoraLayout.of(targets, LoraSettings(r=2, target_modules=TARGETS))
    module = PopulationModule(PersonalModel(lm, targets), layout, dropout, seed=3)
    generator = torch.Generator().manual_seed(4)
    for lora in module.loras:  # else B is zero, and A has no gradient
        lora.lora_B.data = torch.randn(lora.lora_B.shape, generator=generator) * 0.1
    module.loras.to(dtype)
    batch = collate(random_examples(9, 1, seed=2, longest=40), packing=packing)
    assert (batch.text_RT is not None) == packing
    keys = dropout_keys(5, 6, batch) if dropout else None
    loss, numbers = module(RankBatch(batch, 1.0, 20, 9, 1, Rows(key_R=keys)))
    loss.backward()
    return float(loss.detach()), numbers, [p.grad for p in module.parameters() if p.requires_grad]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_the_population_stage_learns_the_same_from_packed_rows(dtype, tolerance, dropout):
    loss, numbers, gradients = losses_and_gradients(False, dtype, dropout)
    packed_loss, packed_numbers, packed_gradients = losses_and_gradients(True, dtype, dropout)
    assert packed_loss == pytest.approx(loss, rel=tolerance)
    assert packed_numbers["tokens"] == numbers["tokens"]
    scale = max(float(gradient.abs().max()) for gradient in gradients)
    assert scale > 1e-3
    for plain, packed in zip(gradients, packed_gradients, strict=True):
        assert (plain - packed).abs().max() < tolerance * max(1.0, scale)
