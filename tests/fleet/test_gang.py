"""When a gang starts again, with how many ranks, and when it is given up; Ray itself is left out."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from ray.exceptions import ActorDiedError
from ray.train import TrainingFailedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError

from proper_ds.config import RunConfig
from proper_ds.distributed.config import DistributedConfig
from proper_ds.errors import ConfigError, FleetError, UserError
from proper_ds.fleet import gang
from proper_ds.fleet.cluster import Cluster, Node

LOST = TrainingFailedError("a rank went")


@dataclass
class Script:
    """What happens: each attempt ends in the next of `ends`, each look at the cluster finds the next of `nodes`."""

    ends: list[tuple[Exception | None, str]]
    nodes: list[dict[str, Node]] = field(default_factory=lambda: [{"a": Node(1, 0), "b": Node(1, 0)}])
    is_ours: bool = False
    on_gpu: bool = False
    at: str = ""
    started: list[tuple[int, str]] = field(default_factory=list)

    def run_once(self, entry, config, options, stage, scaling):
        self.started.append((scaling.num_workers, scaling.label_selector[gang.NODE_ID]))
        error, self.at = self.ends.pop(0)
        if error is not None:
            raise error

    def now(self):
        nodes = self.nodes.pop(0) if len(self.nodes) > 1 else self.nodes[0]
        return Cluster(nodes, False, self.is_ours)


@pytest.fixture
def play(monkeypatch, tmp_path):
    """`play(script, **distributed)` runs a gang by a script; its clock stands, but for the waiting."""
    clock = [0.0]
    monkeypatch.setattr(gang.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gang.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(Cluster, "answering", lambda self: self)

    def run(script, **distributed):
        monkeypatch.setattr(gang, "_run_once", script.run_once)
        config = RunConfig(output_dir=str(tmp_path), distributed=DistributedConfig(**({"num_ranks": 2} | distributed)))
        gang.run_gang("entry", config, {}, "population", script, lambda: script.at)
        return script

    return run


def test_ranks_may_be_lost_as_long_as_checkpoints_come(play):
    ends = [(LOST, f"step {step}") for step in (4, 8, 8, 12, 12)]
    assert len(play(Script([*ends, (None, "the end")]), max_restarts=2).started) == 6


def test_losses_in_a_row_without_a_checkpoint_end_it(play):
    script = Script([(LOST, "step 4"), (LOST, "step 4"), (LOST, "step 4"), (None, "the end")])
    with pytest.raises(FleetError, match=r"loss 3 in a row without a new checkpoint .* Run again to go on"):
        play(script, max_restarts=2)
    assert len(script.started) == 3


@pytest.mark.parametrize("error", [UserError("the data"), FleetError("the loss is nan")])
def test_what_another_try_cannot_mend_is_not_tried_again(play, error):
    script = Script([(error, "step 4"), (None, "the end")])
    with pytest.raises(type(error), match=str(error)):
        play(script)
    assert len(script.started) == 1


def test_those_that_are_left_go_on_on_the_hosts_that_are_left(play):
    both, one = {"a": Node(1, 0), "b": Node(1, 0)}, {"b": Node(1, 0)}
    script = play(Script([(LOST, "step 4"), (LOST, "step 8"), (None, "")], nodes=[both, one, both]))
    assert script.started == [(2, "in(a,b)"), (1, "in(b)"), (2, "in(a,b)")]


def test_too_few_wait_for_others(play):
    both, one = {"a": Node(1, 0), "b": Node(1, 0)}, {"b": Node(1, 0)}
    script = play(Script([(LOST, "step 4"), (None, "")], nodes=[both, one, one, {}, both]), min_ranks=2)
    assert script.started == [(2, "in(a,b)"), (2, "in(a,b)")]


def test_nobody_waits_for_ever(play):
    script = Script([(LOST, "step 4")], nodes=[{"a": Node(2, 0)}, {}])
    with pytest.raises(FleetError, match=r"no room for 1 rank .* within 30 s .*0 CPUs"):
        play(script, start_timeout_s=30)


def test_on_a_machine_of_ones_own_what_does_not_fit_is_refused(play):
    with pytest.raises(ConfigError, match=r"distributed.num_ranks: 4 ranks, but the cluster has 2 CPUs"):
        play(Script([], is_ours=True), num_ranks=4)


def test_ranks_that_failed_because_of_a_lost_one_are_not_named():
    died = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())
    error = WorkerGroupError("", {0: RuntimeError("connection reset"), 1: died})
    assert gang._reason(error).startswith("rank 1 was lost (")
    assert "rank 0" not in gang._reason(error)
    assert gang._reason(WorkerGroupError("", {0: RuntimeError("no memory")})) == "rank 0 was lost (no memory)"
