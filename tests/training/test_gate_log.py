"""What stages log of their gates: over all ranks together, and as a warning for people where something is wrong."""

from __future__ import annotations

import logging

import pytest
import torch

from proper_ds.distributed.ranks import Ranks, current_ranks
from proper_ds.model.groups import GroupLevel, GroupSizes
from proper_ds.model.presets import PRESETS
from proper_ds.observe.metrics import MetricsFile, read_events
from proper_ds.training.gate_log import GateLog
from tests.distributed.gang import run_ranks
from tests.store.stores import LAYOUT

N = 4
HERE = Ranks(0, 1, torch.device("cpu"))


def level_of(preset="proper"):
    sizes = {"feature_size": 4, "user_vector_size": 3} if preset == "proper" else {"num_users": 2}
    return GroupLevel(LAYOUT, PRESETS[preset], GroupSizes(N, **sizes), 0)


def texts(users):
    """Gates [M, X, N] of texts; each a function of its user alone."""
    rows = [torch.randn(2, N, generator=torch.Generator().manual_seed(user)) * 3 for user in users]
    return torch.stack(rows, dim=1).softmax(-1)


def counted(users, ranks):
    log = GateLog("group/proper", "group", level_of())
    if users:
        log.stats.add(texts(users), torch.ones(len(users)), users)
    return log.numbers(ranks)["gates"]


def on_a_rank(shares):
    ranks = current_ranks(1)
    rows = torch.tensor(shares[ranks.rank], dtype=torch.int64).reshape(-1, 1)
    return counted(shares[ranks.rank], ranks), ranks.gather_rows(rows).flatten().tolist()


def test_ranks_with_unlike_numbers_of_texts_log_what_one_would():
    shares = [[5, 6, 5], []]
    for found, users in run_ranks(on_a_rank, 2, shares):
        assert users == [5, 6, 5]
        assert found == counted([5, 6, 5], HERE)
    shares = [[1], [2, 3, 1, 4]]
    for found, users in run_ranks(on_a_rank, 2, shares):
        assert users == [1, 2, 3, 1, 4]
        for name, value in counted([1, 2, 3, 1, 4], HERE).items():
            assert found[name] == pytest.approx(value, abs=2e-4), name


def test_a_stage_that_ends_badly_says_so_to_the_log_and_to_the_driver(tmp_path, caplog):
    level = level_of()
    log, metrics = GateLog("group/proper", "group", level), MetricsFile(tmp_path / "metrics.jsonl")
    log.stats.add(torch.full((2, 5, N), 1 / N), torch.full((5,), torch.tensor(float(N)).log().item()), list(range(5)))
    log.numbers(HERE)
    for _, b_NEr in level.expert_weights():
        b_NEr.copy_(torch.randn(b_NEr.shape[1:]).expand_as(b_NEr))
    for a_NrD, _ in level.expert_weights():
        a_NrD.copy_(a_NrD[:1].clone().expand_as(a_NrD))
    with caplog.at_level(logging.WARNING, logger="proper_ds"):
        log.finish(metrics, level.expert_weights())
    events, _ = read_events(tmp_path / "metrics.jsonl")
    assert events[0]["event"] == "experts"
    assert events[0]["likeness"]["max"] == pytest.approx(1)
    assert events[0]["gates"]["num_texts"] == 5
    uniform, alike = events[0]["problems"]
    assert "gates stayed uniform" in uniform
    assert "experts are alike: 6 pairs" in alike
    assert [event["warning"] for event in events[1:]] == [uniform, alike]
    assert uniform in caplog.text


def test_the_end_is_judged_by_more_than_the_last_line(tmp_path):
    """With a line of metrics for each step, the last one has seen hardly anybody."""
    log, metrics = GateLog("router/proper", "router", level_of()), MetricsFile(tmp_path / "metrics.jsonl")
    for user in range(40):
        log.stats.add(torch.eye(N)[[user % N]].expand(2, 1, N), torch.zeros(1), [user])
        assert log.numbers(HERE)["gates"]["num_users"] == 1
    log.finish(metrics, None)
    ((event,), _) = read_events(tmp_path / "metrics.jsonl")
    assert event["gates"]["num_users"] == 32
    assert event["gates"]["user_share"] == [0.25] * N
    assert event["problems"] == []


def test_a_stage_resumed_after_its_last_step_still_tells_of_its_experts(tmp_path):
    level = level_of("proper-released")
    generator = torch.Generator().manual_seed(1)
    for _, b_NEr in level.expert_weights():
        b_NEr.copy_(torch.randn(b_NEr.shape, generator=generator))
    GateLog("group/proper-released", "group", level).finish(MetricsFile(tmp_path / "m"), level.expert_weights())
    ((event,), _) = read_events(tmp_path / "m")
    assert event["gates"] is None
    assert abs(event["likeness"]["mean"]) < 0.9
