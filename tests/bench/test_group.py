"""The benchmarks of the group level measure what they say: equal trainings, and memory that falls with the ranks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from proper_ds.bench import group_speed
from proper_ds.bench.group_grid import WORKLOAD, Case, R, cases, measure
from proper_ds.bench.group_memory import measure as measure_base
from proper_ds.bench.group_memory import write_bases
from proper_ds.bench.workloads import PRESETS
from proper_ds.errors import UserError

TINY = dataclasses.replace(PRESETS["small"], hidden_size=32, intermediate_size=48, num_layers=2, vocab_size=64)


def test_the_loop_trains_what_the_fused_experts_train(monkeypatch):
    monkeypatch.setitem(group_speed.PRESETS, "tiny", TINY)
    found = group_speed.compare("tiny", 3, num_repeats=2)
    assert found["max_loss_difference_to_loop"] < 1e-5
    first, last = found["loss"]["loop"]
    assert last != pytest.approx(first, rel=1e-3), "they must train something"
    assert set(found["tokens_per_s"]) == {"fused", "loop", "ceiling"}


def test_trainings_that_differ_have_no_speed(monkeypatch):
    monkeypatch.setitem(group_speed.PRESETS, "tiny", TINY)
    monkeypatch.setattr(group_speed, "LEARNING_RATE", 0.05)
    made = group_speed.variants

    def spoiled(*args):
        found = made(*args)
        with torch.no_grad():
            for parameter in found["loop"]._trained:
                parameter.mul_(1.5)
        return found

    monkeypatch.setattr(group_speed, "variants", spoiled)
    with pytest.raises(UserError, match="do not train the same"):
        group_speed.compare("tiny", 3, num_repeats=2)


def test_ranks_are_measured_at_every_setting():
    every = cases([1, 2], most_experts=4096)
    assert {case.zero for case in every} == {0, 1, 2, 3}
    assert {case.num_experts for case in every} >= {5, 64, 512, 4096}
    assert {(case.num_ranks, case.expert_parallel_size) for case in every} == {(1, 1), (2, 1), (2, 2)}
    assert all(case.num_experts % case.expert_parallel_size == 0 for case in every)


def test_experts_on_two_ranks_take_half_on_each():
    alone, spread = measure([Case(1, 2, 1, 1024, "top-2"), Case(2, 2, 2, 1024, "top-2")])
    numbers = 1024 * R * 3 * (WORKLOAD.hidden_size + WORKLOAD.intermediate_size) * WORKLOAD.num_layers
    assert alone["peak_bytes"] > 5 * 4 * numbers, "weights, gradients, and what AdamW keeps and copies, in fp32"
    assert alone["peak_bytes"] - spread["peak_bytes"] > 0.4 * 5 * 4 * numbers
    (placed,) = measure([Case(2, 2, 2, 64, "blocks")])
    assert min(spread["tokens_per_s"], placed["tokens_per_s"]) > 0


def test_a_rank_holds_its_share_of_the_base_only(tmp_path):
    num_bytes = write_bases(PRESETS["large"], tmp_path)
    assert num_bytes > 200e6
    found = measure_base(tmp_path, num_ranks=2, sharded=True, checkpointed=False)
    assert num_bytes / 2 < found["load"] < 0.75 * num_bytes
    assert found["train"] < 1.3 * num_bytes
