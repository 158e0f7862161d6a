"""Experts as fused and grouped products against a loop over them; shares of experts; blocks and tables of users."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proper_ds.model.experts import Experts, NoExchange, by_expert, choose
from proper_ds.model.groups import GroupLevel, GroupSizes
from proper_ds.model.lora import LoraLayout, ModuleShape
from proper_ds.model.presets import PRESETS, preset_of
from proper_ds.model.routing import Rows
from proper_ds.model.user_vectors import fit_blocks, initial_lines

LAYOUT = LoraLayout((ModuleShape("a", 12, 10), ModuleShape("b", 10, 6)), 3, 6.0)
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 0.15, torch.float64: 1e-12}


def experts_of(num_experts, r, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    held = Experts(torch.randn(num_experts, r, 12, generator=generator), 10, 0.5)
    held.lora_B.data = torch.randn(num_experts, 10, r, generator=generator)
    return held.to(dtype)


def loop(held, x, gates):
    """One expert after another, as the released code does."""
    return sum(gates[:, i : i + 1] * 0.5 * (x @ held.lora_A[i].T @ held.lora_B[i].T) for i in range(held.num_held))


@pytest.mark.parametrize("dtype", CLOSE)
def test_the_fused_product_equals_the_loop(dtype):
    held = experts_of(5, 4, dtype)
    x, gates = torch.randn(7, 12).to(dtype), torch.rand(7, 5).to(dtype)
    assert (held.mixed(x, gates) - loop(held, x, gates)).abs().max() < CLOSE[dtype] * 10


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 20), st.integers(1, 4), st.sampled_from(list(CLOSE)))
def test_grouped_products_equal_the_loop_for_any_rank_and_with_experts_left_out(num, r, num_tokens, top_k, dtype):
    top_k = min(top_k, num)
    held = experts_of(num, r, dtype)
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 12, generator=generator).to(dtype).requires_grad_()
    gates = torch.randn(num_tokens, num, generator=generator).softmax(-1).to(dtype).requires_grad_()
    chosen = choose(gates, top_k)
    found = NoExchange().sparse(held, x, chosen)
    dense = torch.zeros_like(gates).scatter(1, chosen.expert_Xk, chosen.gate_Xk)
    wanted = loop(held, x, dense)
    assert found.shape == (num_tokens, 10)
    assert num_tokens == 0 or (found - wanted).abs().max() < CLOSE[dtype] * 20
    leaves = [x, gates, held.lora_A, held.lora_B]
    weights = torch.randn(found.shape, generator=generator).to(dtype)
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), leaves, retain_graph=True),
        torch.autograd.grad((wanted * weights).sum(), leaves),
        strict=True,
    ):
        assert num_tokens == 0 or (a - b).abs().max() <= CLOSE[dtype] * 40 * max(1.0, float(b.abs().max()))


def test_rows_of_no_expert_are_no_rows():
    counts = torch.tensor([0, 0, 0])
    assert by_expert(torch.zeros(0, 4), torch.randn(3, 4, 5), counts).shape == (0, 5)


def test_gates_of_several_experts_sum_to_one_and_one_alone_keeps_its_own():
    gates = torch.tensor([[0.5, 0.3, 0.2]])
    assert choose(gates, 2).gate_Xk.tolist() == [pytest.approx([0.625, 0.375])]
    assert choose(gates, 1).gate_Xk.tolist() == [pytest.approx([0.5])]
    assert choose(gates, 2).expert_Xk.tolist() == [[0, 1]]


@pytest.mark.parametrize("preset", PRESETS)
def test_shares_of_experts_are_those_of_the_whole_level(preset, tmp_path):
    sizes = GroupSizes(6, feature_size=4, user_vector_size=3, num_users=5)
    whole = GroupLevel(LAYOUT, PRESETS[preset], sizes, seed=1)
    whole.save(tmp_path / "level.safetensors", "group")
    for held in (range(2), range(2, 4), range(4, 6)):
        fresh = GroupLevel(LAYOUT, PRESETS[preset], sizes, seed=1, held=held)
        for part in (fresh, GroupLevel.load(tmp_path / "level.safetensors", held)):
            for (a, b), (whole_a, whole_b) in zip(part.expert_weights(), whole.expert_weights(), strict=True):
                assert torch.equal(a, whole_a[held.start : held.stop])
                assert torch.equal(b, whole_b[held.start : held.stop])
            for name, value in part.mixtures.state_dict().items():
                assert torch.equal(value, whole.mixtures.state_dict()[name])


def test_only_the_experts_of_a_users_block_have_gates():
    sizes = GroupSizes(6, num_blocks=3, feature_size=4, user_vector_size=2)
    level = GroupLevel(LAYOUT, PRESETS["proper"], sizes, seed=1)
    level.encoder.centroids.copy_(torch.eye(3, 4))
    features = torch.eye(3, 4)[[2, 0, 1]]
    vectors = level.encoder(features, torch.tensor([True, True, False]))
    assert vectors.shape == (3, 2 + 3)
    rows = Rows(user_RU=vectors, gates={})
    x = torch.randn(3, 4, 12)
    level.by_module()["a"]("a", x, x, None, rows)
    for row, block in enumerate((2, 0, 1)):
        gates = rows.gates["a"][row]
        assert torch.allclose(gates.sum(-1), torch.ones(4))
        assert (gates[:, 2 * block : 2 * block + 2] > 0).all()
        outside = [n for n in range(6) if n // 2 != block]
        assert not gates[:, outside].any()


def test_blocks_hold_users_that_are_alike():
    centres = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9]])
    users = torch.cat([centre + torch.randn(20, 3, generator=torch.Generator().manual_seed(3)) for centre in centres])
    found = torch.cdist(users, fit_blocks(users, 3, seed=0)).argmin(1).view(3, 20)
    assert all(len(set(row.tolist())) == 1 for row in found)
    assert len({int(row[0]) for row in found}) == 3
    with pytest.raises(ValueError, match="only 2 users differ, too few for 3 blocks"):
        fit_blocks(torch.tensor([[1.0], [2.0], [1.0]]), 3, seed=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 5))
def test_a_tables_lines_do_not_depend_on_who_holds_them(a, b, seed):
    start, stop = min(a, b), max(a, b)
    whole = initial_lines(0, 3000, 2, seed)
    assert torch.equal(initial_lines(start, stop, 2, seed), whole[start:stop])
    assert not whole[0].any()


def test_a_user_table_may_take_the_encoders_place_in_proper(tmp_path):
    preset = preset_of("proper", "table")
    level = GroupLevel(LAYOUT, preset, GroupSizes(4, user_vector_size=3, num_users=2), seed=0)
    assert level.encoder is None
    assert level.user_table.weight.shape == (3, 3)
    level.save(tmp_path / "level.safetensors", "group")
    again = GroupLevel.load(tmp_path / "level.safetensors")
    assert again.preset == preset
    assert preset_of("proper-released", "encoder") == PRESETS["proper-released"]
