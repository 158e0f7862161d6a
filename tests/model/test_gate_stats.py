"""What is logged about gates and experts: shares by user, likeness without forming updates, and warnings that fire."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proper_ds.model.gate_stats import (
    MAX_COMPARED,
    MAX_LISTED,
    GateStats,
    compared_experts,
    gate_numbers,
    gate_problems,
    likeness,
    likeness_numbers,
)

CPU = torch.device("cpu")


def entropy_of(omega_MXN):
    return -(omega_MXN * omega_MXN.clamp_min(1e-12).log()).sum(-1).mean(0)


def numbers_of(omega_MXN, users):
    stats = GateStats(omega_MXN.shape[0], omega_MXN.shape[2])
    stats.add(omega_MXN, entropy_of(omega_MXN), users)
    texts, sums = stats.take(CPU)
    return gate_numbers(texts, sums, omega_MXN.shape[2])


def one_hot(experts, num_experts):
    """Gates [1, X, N] of texts that each use one expert."""
    return torch.eye(num_experts)[experts].unsqueeze(0)


def test_every_user_has_one_vote_however_many_texts():
    omega = one_hot([0, 0, 0, 1, 2, 2], 4)
    found = numbers_of(omega, [7, 7, 7, 7, 8, 9])
    assert found["user_share"] == pytest.approx([3 / 12, 1 / 12, 8 / 12, 0], abs=1e-4)
    assert found["mean_gate"] == pytest.approx([3 / 6, 1 / 6, 2 / 6, 0], abs=1e-4)
    assert (found["num_users"], found["num_texts"], found["num_used"]) == (3, 6, 3)
    assert found["top_share"] == pytest.approx(2 / 3, abs=1e-5)
    assert found["entropy"] == pytest.approx(0, abs=1e-6)


def test_effective_experts_and_entropy_at_both_ends():
    uniform = numbers_of(torch.full((3, 5, 8), 1 / 8), list(range(5)))
    assert uniform["num_effective"] == pytest.approx(8, abs=1e-5)
    assert uniform["entropy"] == pytest.approx(math.log(8), abs=1e-6)
    shared = numbers_of(one_hot([0, 1, 2, 3], 4), [0, 1, 2, 3])
    assert shared["num_effective"] == pytest.approx(4, abs=1e-5)
    assert shared["entropy"] == pytest.approx(0, abs=1e-6)
    assert numbers_of(one_hot([2, 2], 4), [0, 1])["num_effective"] == pytest.approx(1, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(2, 12), st.integers(2, 9), st.integers(0, 10**6))
def test_ranks_put_together_say_what_one_would(num_modules, num_texts, num_experts, seed):
    generator = torch.Generator().manual_seed(seed)
    omega = torch.rand(num_modules, num_texts, num_experts, generator=generator).softmax(-1)
    users = torch.randint(0, 4, (num_texts,), generator=generator).tolist()
    whole, parts = numbers_of(omega, users), []
    for rank in range(2):
        stats = GateStats(num_modules, num_experts)
        for x in range(rank, num_texts, 2):  # a text a step, as micro-batches come
            stats.add(omega[:, x : x + 1], entropy_of(omega[:, x : x + 1]), users[x : x + 1])
        parts.append(stats.take(CPU))
    together = gate_numbers(torch.cat([p[0] for p in parts]), parts[0][1] + parts[1][1], num_experts)
    assert together.keys() == whole.keys()
    for name, value in whole.items():
        assert together[name] == pytest.approx(value, abs=2e-4), name
    assert sum(whole["user_share"]) == pytest.approx(1, abs=1e-3)
    assert 1 <= whole["num_effective"] <= num_experts + 1e-4


def test_taken_is_gone():
    stats = GateStats(1, 3)
    stats.add(one_hot([1], 3), torch.zeros(1), [4])
    assert len(stats.take(CPU)[0]) == 1
    texts, sums = stats.take(CPU)
    assert not len(texts)
    assert not sums.any()


def test_thousands_of_experts_stay_a_short_line():
    num = 4096
    found = numbers_of(torch.rand(2, 6, num).softmax(-1), list(range(6)))
    assert "user_share" not in found
    falling = found["mean_gate_by_rank"]
    assert len(falling) == MAX_LISTED
    assert falling == sorted(falling, reverse=True)
    assert sum(falling) * num / MAX_LISTED == pytest.approx(1, rel=1e-2)
    chosen = compared_experts(num)
    assert chosen == compared_experts(num) == sorted(set(chosen))
    assert len(chosen) == MAX_COMPARED
    cosine = likeness([(torch.randn(num, 2, 5), torch.randn(num, 3, 2))], chosen)
    assert len(json.dumps(found | likeness_numbers(cosine, chosen))) < 50_000


def test_likeness_is_the_cosine_of_the_formed_updates():
    torch.manual_seed(2)
    modules = [(torch.randn(4, 2, 5), torch.randn(4, 3, 2)), (torch.randn(4, 2, 7), torch.randn(4, 6, 2))]
    for a, b in modules:  # expert 1: the same update from other factors
        turn = torch.tensor([[0.0, 2.0], [-0.5, 0.0]])
        a[1], b[1] = turn @ a[0], b[0] @ turn.inverse()
        b[3] = 0
    whole = torch.stack([torch.cat([(b[i] @ a[i]).flatten() for a, b in modules]) for i in range(4)]).double()
    wanted = torch.nn.functional.cosine_similarity(whole[:, None], whole[None, :], dim=-1)
    found = likeness(modules, range(4))
    torch.testing.assert_close(found[:3, :3], wanted[:3, :3], rtol=0, atol=1e-6)
    assert not found[3].any()
    about = likeness_numbers(found, range(4))
    assert about["most_alike"] == [0, 1]
    assert about["max"] == pytest.approx(1, abs=1e-5)
    assert about["num_alike"] == 1


def fine(num_users=40, num_experts=4):
    return numbers_of(one_hot([n % num_experts for n in range(num_users)], num_experts), list(range(num_users)))


def test_nothing_is_wrong_with_experts_that_are_shared_and_differ():
    apart = likeness_numbers(torch.eye(4, dtype=torch.float64), range(4))
    assert gate_problems(fine(), apart, "group", True) == []


@pytest.mark.parametrize("is_steered", [True, False])
@pytest.mark.parametrize("section", ["group", "router", "joint"])
def test_every_failure_is_told_with_what_to_change(section, is_steered):
    users = list(range(40))
    uniform = numbers_of(torch.full((2, 40, 4), 0.25), users)
    (said,) = gate_problems(uniform, None, section, is_steered)
    assert "uniform" in said
    collapsed = numbers_of(one_hot([0] * 38 + [1, 2], 4), users)
    (said,) = gate_problems(collapsed, None, section, is_steered)
    assert "collapsed: in 1 of 1 modules" in said
    assert f"{section}." in said
    idle = numbers_of(one_hot([0] * 30 + [1] * 10, 8), users)
    (said,) = gate_problems(idle, None, section, is_steered)
    assert "idle: of 8, 2.0" in said
    same = likeness_numbers(torch.ones(4, 4, dtype=torch.float64), range(4))
    (said,) = gate_problems(fine(), same, section, is_steered)
    assert "alike: 6 pairs" in said


def test_few_users_cannot_leave_experts_idle_or_collapse():
    assert gate_problems(numbers_of(one_hot([0] * 9, 4), list(range(9))), None, "group", True) == []
    assert gate_problems(numbers_of(one_hot([0] * 10, 4), list(range(10))), None, "group", True) != []
    few = numbers_of(one_hot([0, 1, 2], 64), [0, 1, 2])
    assert gate_problems(few, None, "group", True) == []
