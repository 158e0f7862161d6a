"""User features are the gradient of the loss that they claim to be, and the encoder treats the unknown as generic."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from proper_ds.model.user_vectors import PRIOR_ITEMS, UserEncoder, item_features, pooled

HIDDEN, VOCAB = 6, 11


def some_targets(num_targets=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(num_targets, HIDDEN, generator=generator)
    head = torch.randn(VOCAB, HIDDEN, generator=generator)
    target = torch.randint(0, VOCAB, (num_targets,), generator=generator)
    return state, head, target


def test_the_first_half_is_minus_the_gradient_by_the_state():
    state, head, target = some_targets()
    state.requires_grad_()
    functional.cross_entropy(state @ head.T, target, reduction="sum").backward()
    rows = torch.tensor([0, 0, 1, 1, 1])
    found = item_features(state.detach(), (state @ head.T).detach(), target, rows, head)
    wanted = torch.zeros(2, HIDDEN).index_add_(0, rows, -state.grad)
    torch.testing.assert_close(found[:, :HIDDEN], wanted)


def test_the_sketch_keeps_the_likeness_of_outer_products():
    """Over many projections, products of sketches estimate <d d'> <h h'>; one of fixed seed must agree in sign."""
    state, head, target = some_targets(2, seed=4)
    row = torch.zeros(1, dtype=torch.int64)
    one = item_features(state[:1], state[:1] @ head.T, target[:1], row, head)[0, HIDDEN:]
    same = item_features(state[:1], state[:1] @ head.T, target[:1], row, head)[0, HIDDEN:]
    turned = item_features(-state[:1], state[:1] @ head.T, target[:1], row, head)[0, HIDDEN:]
    assert one.equal(same)
    torch.testing.assert_close(turned, -one)
    assert one.abs().sum() > 0


def test_an_item_adds_up_whatever_else_is_in_the_batch():
    state, head, target = some_targets(4)
    logits = state @ head.T
    together = item_features(state, logits, target, torch.tensor([0, 0, 1, 1]), head)
    zero = torch.zeros(2, dtype=torch.int64)
    alone = [item_features(state[k : k + 2], logits[k : k + 2], target[k : k + 2], zero, head)[0] for k in (0, 2)]
    torch.testing.assert_close(together, torch.stack(alone))


def test_little_evidence_is_little_deviation():
    item = torch.ones(4)
    assert pooled(item * 0, 0).equal(item * 0)
    one, many = pooled(item, 1), pooled(item * 300, 300)
    assert one[0] == pytest.approx(1 / (1 + PRIOR_ITEMS))
    assert many[0] == pytest.approx(1, abs=0.02)


def test_users_without_history_get_the_generic_vector():
    encoder = UserEncoder(4, 3, torch.Generator().manual_seed(1))
    with torch.no_grad():
        encoder.generic.copy_(torch.tensor([1.0, 2.0, 3.0]))
        features = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
        found = encoder(features, torch.tensor([True, False, True]))
        changed = encoder(features + 1, torch.tensor([True, False, True]))
    assert found[1].tolist() == [1.0, 2.0, 3.0]
    assert changed[1].equal(found[1])
    assert not changed[0].equal(found[0])
