"""The report's part on routers and experts: from lines of metrics to tables, plots and warnings."""

from __future__ import annotations

import pytest
import torch

from proper_ds.evaluation.gate_plots import gate_curves
from proper_ds.evaluation.gates import gate_history, gate_rows, jump_lines, problem_lines
from proper_ds.model.gate_stats import GateStats, gate_numbers, likeness_numbers


def gates_of(num_experts, seed):
    stats = GateStats(2, num_experts)
    omega = torch.rand(2, 12, num_experts, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    stats.add(omega, torch.ones(12), list(range(12)))
    return gate_numbers(*stats.take(torch.device("cpu")), num_experts)


def events_of(stage, num_experts, steps, problems=()):
    lines = [{"stage": stage, "step": step, "loss": 1.0, "gates": gates_of(num_experts, step)} for step in steps]
    alike = likeness_numbers(torch.eye(4, dtype=torch.float64), range(4))
    return [*lines, {"stage": stage, "event": "experts", "gates": None, "likeness": alike, "problems": list(problems)}]


def test_steps_repeated_after_a_restart_count_once_and_others_lines_not_at_all():
    events = [{"stage": "population", "step": 1, "loss": 2.0}, *events_of("group/proper", 4, [1, 2, 3, 2, 3])]
    found = gate_history(events)
    assert list(found) == ["group/proper"]
    assert [point["step"] for point in found["group/proper"]["curve"]] == [1, 2, 3]
    assert found["group/proper"]["likeness"]["mean"] == 0


def test_what_an_earlier_run_of_the_stage_warned_of_is_forgotten():
    first = events_of("group/proper", 4, [1, 2], ["gates stayed uniform; raise x"])
    assert gate_history(first)["group/proper"]["problems"] == ["gates stayed uniform; raise x"]
    again = [*first, *events_of("group/proper", 4, [1])[:1]]
    assert gate_history(again)["group/proper"]["problems"] == []
    assert gate_history(again)["group/proper"]["likeness"] is None


@pytest.mark.parametrize("num_experts", [4, 300])
def test_tables_plots_and_warnings(num_experts):
    events = events_of("group/proper", num_experts, [1, 2, 3], ["experts are alike; lower group.num_experts"])
    events += events_of("router/proper", num_experts, [10])[:1]
    gates = gate_history(events)
    first, second = gate_rows(gates)
    assert first[0] == "group/proper"
    assert f"of {num_experts}" in first[2]
    assert first[5] == "0.000 (0, 1)"
    assert second[5] == ""
    assert gate_curves(gates).startswith("<svg")
    assert gate_curves({}) is None
    report = {
        "gates": gates,
        "router_jumps": [{"stage": "router/proper", "loss_user_gates": 1.5, "loss_lora_gates": 1.75}],
    }
    assert problem_lines(report) == ["group/proper: experts are alike; lower group.num_experts"]
    assert "(+0.2500)" in jump_lines(report)[0]
