"""Expert parallelism, routing and user tables on real ranks have the losses of one plain process (`bench group`)."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from proper_ds.bench.parity import TOLERANCE, Case, cases, train_plain
from proper_ds.distributed.local_ranks import run_local_ranks
from proper_ds.errors import FleetError

ENTRY = "proper_ds.bench.parity:on_ranks"
TWO_RANKS = [
    *(Case(2, zero, size, routing) for zero in (0, 1, 3) for size in (1, 2) for routing in ("dense", "top-2")),
    *(Case(2, 3, 2, routing) for routing in ("blocks", "table", "released")),
]
FOUR_RANKS = [Case(4, 3, 2, "dense"), Case(4, 2, 4, "top-2"), Case(4, 3, 4, "blocks")]


@pytest.mark.parametrize("chosen", [TWO_RANKS, FOUR_RANKS], ids=["two ranks", "four ranks"])
def test_losses_and_gradients_are_those_of_one_process(chosen):
    by_rank = run_local_ranks(ENTRY, chosen[0].num_ranks, {"cases": [asdict(case) for case in chosen]}, 300.0)
    for of_case in zip(*by_rank, strict=True):
        assert of_case[0]["loss_difference"] < TOLERANCE, of_case[0]
        assert max(one["gradient_difference"] for one in of_case) < 1e-5, of_case[0]
        assert of_case[0]["losses"][-1] < 0.9 * of_case[0]["losses"][0], "the test must train something"


def test_routings_differ_from_each_other():
    last = [train_plain(routing)[0][-1] for routing in ("dense", "top-2", "blocks", "table", "released")]
    assert min(abs(a - b) for n, a in enumerate(last) for b in last[:n]) > 1e-3


def test_the_benchmark_runs_what_the_issue_names():
    found = [case for num_ranks in (1, 2, 4) for case in cases(num_ranks)]
    for routing in ("dense", "top-2"):
        shapes = {(c.num_ranks, c.zero, c.expert_parallel_size) for c in found if c.routing == routing}
        assert len(shapes) == 4 * (1 + 2 + 3)


def test_the_first_error_of_a_rank_is_told():
    with pytest.raises(FleetError, match="on 2 ranks"):
        run_local_ranks(ENTRY, 2, {"cases": [{"num_ranks": 2}]}, 60.0)
