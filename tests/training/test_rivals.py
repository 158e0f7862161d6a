"""The modules of PPlug and PLoRA: gradients under checkpointing, whom a step moves, and that nothing else trains."""

from __future__ import annotations

import pytest
import torch

from proper_ds.data.batches import collate
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.checkpointing import checkpoint_layers
from proper_ds.model.config import LoraSettings
from proper_ds.model.lora import LoraLayout
from proper_ds.model.persona import Persona, PersonaInputs, PersonaSizes
from proper_ds.model.plora import PersonalLoras
from proper_ds.training.persona_inputs import with_personal
from proper_ds.training.plora import PloraModule
from proper_ds.training.pplug import PplugModule
from proper_ds.training.rank_batch import RankBatch
from tests.fakes import random_examples, tiny_llama

TARGETS, SIZE = ["q_proj", "down_proj"], 5


def made(kind, table_LU, *, is_checkpointed=False):
    lm = tiny_llama()
    if is_checkpointed:
        checkpoint_layers(lm)
    if kind == "pplug":
        return PplugModule(PersonalModel(lm, {}), Persona(PersonaSizes(SIZE, 32, 0.3, 0.8), seed=3))
    targets = find_targets(lm, TARGETS)
    layout = LoraLayout.of(targets, LoraSettings(r=2, target_modules=TARGETS))
    shared = PersonalLoras(layout, SIZE, seed=3)
    for lora in shared.loras:
        torch.nn.init.constant_(lora.lora_B, 0.1)
    return PloraModule(PersonalModel(lm, targets), shared, 0.0, 0.5, lambda line_L: table_LU[line_L])


def batch_of(kind, lines=(2, 0, 4)):
    examples = random_examples(3, 1, seed=4)
    num_targets = sum(example.num_targets for example in examples)
    if kind == "pplug":
        found = RankBatch(collate([with_personal(e) for e in examples]), 1.0, num_targets, 3)
        generator = torch.Generator().manual_seed(1)
        parts = [torch.randn(3, 2, SIZE, generator=generator) for _ in range(2)]
        is_item = torch.tensor([[True, True], [True, False], [False, False]])
        found.persona = PersonaInputs(torch.randn(3, SIZE, generator=generator), *parts, is_item)
        return found
    found = RankBatch(collate(examples), 1.0, num_targets, 3)
    found.line_R = torch.tensor(lines)
    return found


def gradients(kind, **options):
    table_LU = torch.randn(6, SIZE, generator=torch.Generator().manual_seed(2)).requires_grad_()
    module = made(kind, table_LU, **options)
    loss, _ = module(batch_of(kind))
    loss.backward()
    found = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert not [name for name in found if name.startswith("model.")], "the base is frozen"
    return found | ({"table": table_LU.grad} if kind == "plora" else {})


@pytest.mark.parametrize("kind", ["pplug", "plora"])
def test_layers_that_run_again_give_the_same_gradients(kind):
    plain, again = gradients(kind), gradients(kind, is_checkpointed=True)
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        assert grad.abs().sum() > 0, name
        torch.testing.assert_close(again[name], grad, rtol=1e-5, atol=1e-7, msg=name)


def test_a_step_moves_the_vectors_of_its_users_only():
    moved = gradients("plora")["table"].abs().sum(1) > 0
    assert moved.tolist() == [False, False, True, False, True, False]


def test_histories_and_vectors_have_an_effect_and_the_generic_user_none():
    assert made("pplug", None).effect(batch_of("pplug")) > 1e-3
    table_LU = torch.randn(6, SIZE)
    assert made("plora", table_LU).effect(batch_of("plora")) > 1e-3
    assert made("plora", table_LU).effect(batch_of("plora", lines=(0, 0, 0))) == 0
    assert not made("plora", table_LU / 0).effect(batch_of("plora")) < 1, "not a number is no small effect"
