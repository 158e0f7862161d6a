"""PLoRA's equation, its generic user, and the term that brings the generic user's predictions to the users'."""

from __future__ import annotations

import pytest
import torch

from proper_ds.errors import AdapterError
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.config import LoraSettings
from proper_ds.model.lora import LoraLayout, ModuleShape
from proper_ds.model.plora import KIND, TABLE, TEMPERATURE, PersonalLoras, distance_of_generic
from proper_ds.model.routing import Rows
from proper_ds.model.weights_file import save_weights
from tests.fakes import VOCAB, tiny_llama

SETTINGS = LoraSettings(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])
LAYOUT = LoraLayout((ModuleShape("a", 6, 5), ModuleShape("b", 5, 4)), 2, 4.0)


def made():
    """A model with the LoRA attached, all of its B random."""
    lm = tiny_llama(dtype=torch.float64)
    targets = find_targets(lm, SETTINGS.target_modules)
    model = PersonalModel(lm, targets)
    shared = PersonalLoras(LoraLayout.of(targets, SETTINGS), 4, seed=2).double()
    for lora in shared.loras:
        torch.nn.init.normal_(lora.lora_B, std=0.2)
    model.attach_shared(shared.by_module(model.rows))
    return model, shared


def test_the_equation():
    model, shared = made()
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    p = torch.randn(2, 4, dtype=torch.float64)
    model.set_rows(Rows(user_RU=p))
    name = next(name for name in model.adapted if name.endswith("q_proj"))
    lora, wrapped = shared.by_module(model.rows)[name], model.adapted[name]
    for row in range(2):
        code = x[row] @ lora.lora_A.T + lora.lora_P @ p[row]
        wanted = wrapped.base(x[row]) + 2.0 * code @ lora.lora_B.T
        torch.testing.assert_close(wrapped(x)[row], wanted)


def test_the_generic_user_is_a_plain_lora():
    model, shared = made()
    ids = torch.randint(3, VOCAB, (2, 7))
    model.set_rows(Rows(user_RU=torch.zeros(2, 4, dtype=torch.float64)))
    generic = model.hidden(ids)
    for lora in shared.loras:
        torch.nn.init.zeros_(lora.lora_P)
    model.set_rows(Rows(user_RU=torch.randn(2, 4, dtype=torch.float64)))
    torch.testing.assert_close(model.hidden(ids), generic)


def test_the_generic_predictions_alone_are_trained_towards_the_users():
    own, generic = (torch.randn(5, 9, requires_grad=True) for _ in range(2))
    found_K = distance_of_generic(own, generic)
    p, q = (torch.softmax(logits / TEMPERATURE, -1) for logits in (own, generic))
    torch.testing.assert_close(found_K, (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-6)
    assert (found_K > 0).all()
    found_K.sum().backward()
    assert own.grad is None
    torch.testing.assert_close(generic.grad, (q - p).detach() / TEMPERATURE, rtol=1e-4, atol=1e-6)


def test_a_file_is_read_back_and_broken_weights_are_refused(tmp_path):
    shared, table_LU = PersonalLoras(LAYOUT, 4, seed=2), torch.randn(6, 4)
    path = tmp_path / "level.safetensors"
    save_weights(path, shared.state_dict() | {TABLE: table_LU}, KIND, shared.description(), "plora")
    found, found_LU = PersonalLoras.load(path)
    assert torch.equal(found_LU, table_LU)
    for name, value in shared.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    broken = table_LU / 0
    with pytest.raises(AdapterError, match=r"not finite in user_table.*plora\.learning_rate"):
        save_weights(tmp_path / "b.safetensors", {TABLE: broken}, KIND, shared.description(), "plora")
    assert not (tmp_path / "b.safetensors").exists()
