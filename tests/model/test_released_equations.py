"""The group mathematics against a plain, slow transcription of the equations (methods.md 1.4 to 1.6)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proper_ds.errors import AdapterError
from proper_ds.model.config import LoraSettings
from proper_ds.model.groups import GroupLevel, GroupSizes
from proper_ds.model.lora import LoraLayout, ModuleShape
from proper_ds.model.presets import PRESETS, preset_of
from proper_ds.model.routing import Rows, constraint, entropy, imbalance, mean_gates

D, E, N, R_LORA, U = 6, 5, 5, 2, 3
LAYOUT = LoraLayout((ModuleShape("m", D, E),), R_LORA, 4.0)


def level_of(preset, seed=0, **sizes):
    defaults = {"feature_size": 4, "user_vector_size": U} if preset == "proper" else {"num_users": 4}
    level = GroupLevel(LAYOUT, PRESETS[preset], GroupSizes(N, **(defaults | sizes)), seed).double()
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in level.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return level


def softmax(values):
    top = max(values)
    parts = [math.exp(v - top) for v in values]
    return [p / sum(parts) for p in parts]


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def plain_sum(mixture, x, gates, factor):
    """sum_i factor * g_i * s * B_i (A_i x), one expert after another."""
    out = torch.zeros(E, dtype=torch.float64)
    for i in range(N):
        out += factor * gates[i] * 2.0 * (mixture.experts.lora_B[i] @ (mixture.experts.lora_A[i] @ x))
    return out


def test_stage_2_released_equals_the_transcription_and_its_bounds():
    level = level_of("proper-released")
    mixture = level.by_module()["m"]
    x_RTD = torch.randn(2, 3, D, dtype=torch.float64)
    rows = Rows(user_RU=level.user_table(torch.tensor([1, 4])), gates={})
    out = mixture("m", x_RTD, x_RTD, None, rows)
    gates = rows.gates["m"]
    for r, user in enumerate((1, 4)):
        for t in range(3):
            x = x_RTD[r, t]
            p_x = softmax([dot(w, x) for w in mixture.router.token])
            p_u = softmax([dot(w, level.user_table.weight[user]) for w in mixture.router.user])
            g = softmax([a + b for a, b in zip(p_x, p_u, strict=True)])
            assert gates[r, t].tolist() == pytest.approx(g, abs=1e-12)
            assert (out[r, t] - plain_sum(mixture, x, g, 1 / N)).abs().max() < 1e-12
    low, high = 1 / (math.e**2 + 4), math.e**2 / (math.e**2 + 4)
    assert gates.min() >= low
    assert gates.max() <= high


def test_stage_32_released_reads_the_user_loras_output():
    level = level_of("proper-released")
    level.add_lora_routers(seed=3)
    level.double()
    mixture = level.by_module()["m"]
    x, o = torch.randn(1, 2, D, dtype=torch.float64), torch.randn(1, 2, E, dtype=torch.float64)
    rows = Rows(gates={})
    out = mixture("m", x, x, o, rows)
    for t in range(2):
        h = softmax([dot(w, o[0, t]) for w in mixture.router.lora])
        assert rows.gates["m"][0, t].tolist() == pytest.approx(h, abs=1e-12)
        assert (out[0, t] - plain_sum(mixture, x[0, t], h, 1 / N)).abs().max() < 1e-12


def test_stage_2_proper_is_one_softmax_of_summed_logits_without_the_factor():
    level = level_of("proper")
    mixture = level.by_module()["m"]
    x, z = torch.randn(1, 2, D, dtype=torch.float64), torch.randn(1, U, dtype=torch.float64)
    rows = Rows(user_RU=z, gates={})
    out = mixture("m", x, x, None, rows)
    for t in range(2):
        g = softmax([dot(mixture.router.token[i], x[0, t]) + dot(mixture.router.user[i], z[0]) for i in range(N)])
        assert rows.gates["m"][0, t].tolist() == pytest.approx(g, abs=1e-12)
        assert (out[0, t] - plain_sum(mixture, x[0, t], g, 1.0)).abs().max() < 1e-12


def test_gates_by_the_user_alone_are_the_same_at_every_token_and_for_nobody_else():
    preset = preset_of("proper", "encoder", gate="user")
    level = GroupLevel(LAYOUT, preset, GroupSizes(N, feature_size=4, user_vector_size=U), 0).double()
    with_tokens = GroupLevel(LAYOUT, PRESETS["proper"], GroupSizes(N, feature_size=4, user_vector_size=U), 0).double()
    own, whole = dict(level.named_parameters()), dict(with_tokens.named_parameters())
    assert {name for name in whole if name not in own} == {"mixtures.m.router.token"}
    assert all(torch.equal(weight, whole[name]) for name, weight in own.items()), "the rest begins alike"
    mixture = level.by_module()["m"]
    x, z = torch.randn(2, 3, D, dtype=torch.float64), torch.randn(2, U, dtype=torch.float64)
    rows = Rows(user_RU=z, gates={})
    mixture("m", x, x, None, rows)
    for user in range(2):
        g = softmax([dot(mixture.router.user[i], z[user]) for i in range(N)])
        for t in range(3):
            assert rows.gates["m"][user, t].tolist() == pytest.approx(g, abs=1e-12)
    texts = Rows(user_RU=z, gates={}, text_RT=torch.tensor([[0, 1, 1]]))
    mixture("m", x[:1], x[:1], None, texts)
    assert torch.equal(texts.gates["m"][0, 1], rows.gates["m"][1, 0])
    # stage 3.2 adds the user's own LoRA to them
    level.add_lora_routers(seed=3)
    router = level.double().by_module()["m"].router
    router.lora.data.normal_()
    o = torch.randn(2, 3, E, dtype=torch.float64)
    gates = router(x, o, Rows(user_RU=z))
    assert gates.shape == (2, 3, N)
    assert not torch.allclose(gates[0, 0], gates[0, 1])


def test_proper_stage_32_starts_where_31_ended_and_released_does_not():
    for preset, same in (("proper", True), ("proper-released", False)):
        level = level_of(preset)
        mixture = level.by_module()["m"]
        x, o = torch.randn(1, 2, D, dtype=torch.float64), torch.randn(1, 2, E, dtype=torch.float64)
        size = U if preset == "proper" else D
        rows = Rows(user_RU=torch.randn(1, size, dtype=torch.float64))
        before = mixture("m", x, x, o, rows)
        level.add_lora_routers(seed=3)
        level.double()
        after = level.by_module()["m"]("m", x, x, o, rows)
        assert torch.equal(before, after) is same


def test_fresh_experts_add_nothing():
    level = GroupLevel(LAYOUT, PRESETS["proper"], GroupSizes(N, feature_size=4, user_vector_size=U), 0)
    x = torch.randn(2, 3, D)
    out = level.by_module()["m"]("m", x, x, None, Rows(user_RU=torch.randn(2, U)))
    assert not out.any()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=N, max_size=N), st.integers(1, 6))
def test_constraint_is_one_minus_the_sum_of_squares_of_the_mean_gates(logits, num_tokens):
    gates_RTN = torch.tensor(logits, dtype=torch.float64).softmax(-1).expand(1, num_tokens, N)
    mean_RN = mean_gates(gates_RTN, torch.ones(1, num_tokens, dtype=torch.bool))
    outer = mean_RN[0][:, None] * mean_RN[0][None, :]
    off_diagonal = outer.sum() - outer.diagonal().sum()
    assert float(constraint(mean_RN)[0]) == pytest.approx(float(off_diagonal), abs=1e-12)
    assert -1e-12 <= float(constraint(mean_RN)[0]) <= 1 - 1 / N + 1e-12
    assert 0 <= float(entropy(gates_RTN).max()) <= math.log(N) + 1e-9


def test_mean_gates_leave_padding_out():
    gates = torch.rand(1, 4, N).softmax(-1)
    mask = torch.tensor([[True, True, False, False]])
    assert torch.allclose(mean_gates(gates, mask)[0], gates[0, :2].mean(0))


def test_imbalance_is_zero_when_shared_alike_and_largest_on_one_expert():
    alike, one = torch.eye(N), torch.eye(N)[:1].repeat(N, 1)
    assert float(imbalance(alike, alike.mean(0)).mean()) == pytest.approx(0, abs=1e-6)
    assert float(imbalance(one, one.mean(0)).mean()) == pytest.approx(N - 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(0, 1000))
def test_imbalance_has_the_gradient_of_the_squared_shares_where_they_are_those_of_before(num_texts, seed):
    mean = torch.randn(num_texts, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    mean.requires_grad_()
    share = mean.mean(0)
    (wanted,) = torch.autograd.grad(N * share.square().sum() - 1, mean, retain_graph=True)
    value = imbalance(mean, share.detach()).mean()
    (found,) = torch.autograd.grad(value, mean)
    assert torch.allclose(found, wanted, atol=1e-12)
    assert float(value) == pytest.approx(float(N * share.square().sum() - 1), abs=1e-12)


def test_gradient_of_the_constraint_is_that_of_finite_differences():
    logits = torch.randn(3, N, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: constraint(v.softmax(-1)).sum(), logits)


@pytest.mark.parametrize("preset", ["proper", "proper-released"])
@pytest.mark.parametrize("lora_aware", [False, True])
def test_a_saved_level_comes_back_whole(tmp_path, preset, lora_aware):
    level = level_of(preset).float()
    if lora_aware:
        level.add_lora_routers(seed=1)
    level.save(tmp_path / "level.safetensors", "group")
    again = GroupLevel.load(tmp_path / "level.safetensors")
    wanted = level.state_dict()
    assert again.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in again.state_dict().items())
    assert not any(p.requires_grad for p in again.parameters())


def test_a_level_that_is_not_finite_is_refused_naming_what_to_lower(tmp_path):
    level = level_of("proper").float()
    next(level.parameters()).data[0] = float("nan")
    with pytest.raises(AdapterError, match=r"not finite in .*; lower joint\.learning_rate"):
        level.save(tmp_path / "level.safetensors", "joint")
    assert not list(tmp_path.iterdir())


def test_unknown_users_get_the_mean_line():
    level = level_of("proper-released")
    level.user_table.settle(torch.tensor([False, True, False, True, False]))
    table = level.user_table.weight
    assert torch.allclose(table[0], table[[1, 3]].mean(0))
    assert torch.equal(table[2], table[0])
    trained = level_of("proper-released").user_table
    before = trained.weight.detach().clone()
    trained.settle(torch.tensor([True, True, False, True, False]))
    assert torch.equal(trained.weight[[0, 1, 3]], before[[0, 1, 3]])
    assert torch.equal(trained.weight[[2, 4]], before[[0, 0]])


def test_layout_of_targets_is_in_model_order():
    shapes = {"a": torch.nn.Linear(3, 4), "b": torch.nn.Linear(4, 2)}
    layout = LoraLayout.of(shapes, LoraSettings(r=2, lora_alpha=3))
    assert layout.num_parameters == 2 * (3 + 4) + 2 * (4 + 2)
    assert LoraLayout.from_json(layout.to_json()) == layout
    assert torch.equal(layout.initial_row(5), layout.initial_row(5))
    assert not torch.equal(layout.initial_row(5), layout.initial_row(6))
    assert not layout.has_effect(layout.initial_row(5))
