"""Prediction for many users at once: label scores and generations equal one user and one label at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from proper_ds.evaluation.predict import decide, generate, score_labels
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.config import LoraSettings
from proper_ds.model.lora import LoraLayout, SlotBuffers
from proper_ds.model.routing import Rows
from tests.fakes import random_examples, tiny_llama

TARGETS = ["q_proj", "down_proj"]
LABELS = [[5, 2], [6, 7, 2], [6, 8, 9, 2], [10, 2]]


def personal(dtype=torch.float64):
    lm = tiny_llama(dtype=dtype)
    targets = find_targets(lm, TARGETS)
    layout = LoraLayout.of(targets, LoraSettings(r=2, lora_alpha=4, target_modules=TARGETS))
    slots = SlotBuffers(layout, 4, dtype, "cpu", trainable=False)
    slots.weights_SP[:3] = torch.randn(3, layout.num_parameters, generator=torch.Generator().manual_seed(1)) * 0.3
    model = PersonalModel(lm, targets)
    model.attach_users(slots.modules())
    return model


def prompts(count):
    return [e.ids[: e.num_prompt] for e in random_examples(count, 3, seed=6)]


SLOTS = [0, 1, 2, 3, 1]


def test_label_scores_equal_one_label_at_a_time():
    model = personal()
    asked = prompts(5)
    model.set_rows(Rows(slot_R=torch.tensor(SLOTS)))
    found = score_labels(model, asked, LABELS)
    for row, prompt in enumerate(asked):
        model.set_rows(Rows(slot_R=torch.tensor([SLOTS[row]])))
        for number, label in enumerate(LABELS):
            ids = torch.tensor([[*prompt.tolist(), *label]])
            logp = model.lm(input_ids=ids).logits[0].log_softmax(-1)
            wanted = sum(float(logp[len(prompt) - 1 + depth, token]) for depth, token in enumerate(label))
            assert float(found[row, number]) == pytest.approx(wanted, abs=1e-5)
    assert found.std(0).min() > 1e-3, "users differ"


def test_a_slot_of_zeros_is_the_base():
    model = personal()
    asked = prompts(1)
    model.set_rows(Rows(slot_R=torch.tensor([3])))
    mine = score_labels(model, asked, LABELS)
    model.attach_users(None)
    assert torch.allclose(mine, score_labels(model, asked, LABELS), atol=1e-12)


def test_generation_in_a_batch_equals_generation_alone():
    model = personal()
    asked = prompts(5)
    model.set_rows(Rows(slot_R=torch.tensor(SLOTS)))
    together = generate(model, asked, 6, eos=2)
    for row, prompt in enumerate(asked):
        model.set_rows(Rows(slot_R=torch.tensor([SLOTS[row]])))
        ids = prompt.tolist()
        for _ in range(6):
            ids.append(int(model.lm(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
        alone = ids[len(prompt) :]
        assert together[row][: len(alone)] == alone


def test_decisions():
    scores = np.log([0.3, 0.05, 0.05, 0.25, 0.35]).tolist()
    labels = ["5", "1", "2", "3", "4"]
    assert decide(scores, labels, ordinal_median=False) == "4"
    assert decide(scores, labels, ordinal_median=True) == "4"
    assert decide(np.log([0.4, 0.3, 0.1, 0.1, 0.1]).tolist(), ["1", "2", "3", "4", "5"], ordinal_median=True) == "2"
