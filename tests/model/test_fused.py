"""What replaces parts of the base for speed gives the base's own numbers, and leaves the base as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from proper_ds.errors import AdapterError
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.halves import Halves
from proper_ds.model.norms import fused_norms
from proper_ds.model.places import Places, at_places
from proper_ds.model.routing import Rows
from tests.fakes import tiny_llama


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_fused_norms_give_the_same_numbers_and_gradients(dtype, tolerance):
    lm = tiny_llama(dtype=dtype)
    norm = lm.model.layers[0].input_layernorm
    norm.weight.data.uniform_(0.5, 2.0)
    x = torch.randn(2, 5, 32).to(dtype).requires_grad_()
    wanted = norm(x)
    (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), x)
    with fused_norms(lm) as num_norms:
        assert num_norms == 2 * 2 + 1
        found = norm(x)
        assert type(found.grad_fn).__name__.startswith("_RmsNorm")
        (found_grad,) = torch.autograd.grad(found.square().sum(), x)
    assert torch.allclose(found, wanted, atol=tolerance)
    assert torch.allclose(found_grad, wanted_grad, rtol=tolerance, atol=10 * tolerance)
    assert not type(norm(x).grad_fn).__name__.startswith("_RmsNorm")


class OffsetRMSNorm(nn.Module):
    """Gemma's kind: the weight is added to one."""

    def __init__(self):
        super().__init__()
        self.eps = 1e-6
        self.weight = nn.Parameter(torch.full((8,), 0.3), requires_grad=False)

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def test_other_norms_and_training_ones_are_left_alone():
    with fused_norms(nn.ModuleList([OffsetRMSNorm()])) as num_norms:
        assert num_norms == 0
    lm = tiny_llama()
    lm.model.norm.weight.requires_grad_(True)
    with fused_norms(lm) as num_norms:
        assert num_norms == 4
    with fused_norms(tiny_llama(dtype=torch.float64)) as num_norms:
        assert num_norms == 0


def test_a_module_runs_at_its_places_only():
    rows, seen = Rows(), []
    module = nn.Linear(4, 3)
    plain = nn.Linear(4, 3)
    plain.load_state_dict(module.state_dict())
    at_places(module, rows)
    x = torch.randn(2, 5, 4)
    assert torch.equal(module(x), plain(x))
    row, column, order = torch.tensor([0, 0, 1]), torch.tensor([1, 4, 2]), torch.tensor([0, 1, 0])
    rows.places = Places(row, column, order, 2)
    found = module(x)
    assert torch.allclose(found[row, column], plain(x)[row, column])
    left = torch.ones(2, 5, dtype=torch.bool)
    left[row, column] = False
    assert not found[left].any()
    inner = rows.places.run(lambda picked: seen.append(picked.shape) or picked, x)
    assert seen == [(2, 2, 4)]
    assert torch.equal(inner[row, column], x[row, column])


def test_halves_are_the_whole_or_refused():
    lm = tiny_llama(num_layers=4)
    model = PersonalModel(lm, {})
    ids = torch.randint(3, 90, (2, 9))
    halves = model.halves(3)
    with torch.no_grad():
        assert torch.allclose(halves.upper(halves.lower(ids, None, None), None, None), model.hidden(ids), atol=1e-6)
    assert len(lm.model.layers) == 4
    with pytest.raises(AdapterError, match=r"cannot be cut.*cache_bytes=0"):
        Halves(nn.Linear(2, 2), 1)


def test_a_backbone_that_does_more_to_its_embeddings_is_refused():
    lm = tiny_llama(num_layers=4)
    inner = type(lm.model).forward

    def forward(self, input_ids=None, inputs_embeds=None, **given):
        states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return inner(self, inputs_embeds=states * 5.0, **given)  # as Gemma does

    lm.model.__class__ = type("ScalingModel", (type(lm.model),), {"forward": forward})
    with pytest.raises(AdapterError, match="not the whole"):
        PersonalModel(lm, {}).halves(2)
