"""The controller with a fake fleet: every unit exactly once, retries elsewhere, stops where a retry cannot help."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proper_ds.errors import DataError, FleetError
from proper_ds.fleet.controller import UNITS_PER_WORKER, Controller, Outcome
from proper_ds.fleet.plan import Unit, plan_units
from proper_ds.fleet.policy import Decision, Failure, FailurePolicy


class FakePool:
    """Workers that finish, fail or die as a script says; holds what is running."""

    def __init__(self, num_workers, behave):
        self.num_workers = num_workers
        self._behave = behave
        self.queues = [[] for _ in range(num_workers)]
        self.replaced, self.most = [], 0

    def submit(self, worker, unit):
        self.queues[worker].append(unit)
        self.most = max(self.most, max(len(q) for q in self.queues))

    def wait(self):
        for worker, queue in enumerate(self.queues):
            if queue:
                unit = queue.pop(0)
                what = self._behave(worker, unit)
                if what is None:
                    return [Outcome(worker, unit, {"by": worker})]
                if what == "dies":
                    return [Outcome(worker, unit, None)]
                return [Outcome(worker, unit, None, what)]
        return []

    def replace(self, worker):
        self.replaced.append(worker)
        self.queues[worker] = []


def units(count):
    return [Unit(n, n + 1, 10) for n in range(count)]


def run(pool, count, max_retries=2):
    done = []
    Controller(units(count), pool, FailurePolicy(max_retries), lambda unit, report: done.append(unit.first)).run()
    return done


def test_every_unit_is_done_once_with_bounded_queues():
    pool = FakePool(3, lambda worker, unit: None)
    assert sorted(run(pool, 20)) == list(range(20))
    assert pool.most <= UNITS_PER_WORKER


def test_no_units_no_work():
    assert run(FakePool(2, lambda worker, unit: None), 0) == []


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 25), st.integers(0, 10_000))
def test_whatever_dies_every_unit_is_done_exactly_once(num_workers, count, seed):
    generator = random.Random(seed)
    deaths = {}

    def behave(worker, unit):
        if generator.random() < 0.3 and deaths.get(unit.name, 0) < 3:
            deaths[unit.name] = deaths.get(unit.name, 0) + 1
            return generator.choice(["dies", RuntimeError("bad luck")])
        return None

    assert sorted(run(FakePool(num_workers, behave), count, max_retries=3)) == list(range(count))


def test_units_queued_at_a_dead_worker_are_not_blamed():
    died = []

    def behave(worker, unit):
        if unit.first == 0 and len(died) < 2:
            died.append(unit)
            return "dies"
        return None

    pool = FakePool(1, behave)
    assert sorted(run(pool, 6, max_retries=2)) == list(range(6))
    assert pool.replaced == [0, 0]


def test_a_unit_that_kills_its_worker_again_and_again_stops_the_run():
    pool = FakePool(2, lambda worker, unit: "dies" if unit.first == 3 else None)
    with pytest.raises(FleetError, match=r"unit-0000000003-0000000004 failed 3 times.*its worker died"):
        run(pool, 6, max_retries=2)


def test_a_fault_of_the_users_stops_at_once():
    tries = []

    def behave(worker, unit):
        tries.append(unit)
        return DataError("no such column") if unit.first == 0 else None

    with pytest.raises(DataError, match="no such column"):
        run(FakePool(1, behave), 5, max_retries=5)
    assert len(tries) == 1


def test_decisions():
    policy = FailurePolicy(max_retries=1)
    assert policy.decide(Failure("u", None, 1)) is Decision.RETRY
    assert policy.decide(Failure("u", RuntimeError(), 2)) is Decision.STOP
    assert policy.decide(Failure("u", DataError(), 1)) is Decision.STOP


@given(st.lists(st.integers(0, 500), min_size=1, max_size=200), st.integers(1, 800))
def test_units_cover_all_users_with_tokens_once_in_order(costs, size):
    found = plan_units(np.asarray(costs), size)
    assert [u.cost for u in found] == sorted((u.cost for u in found), reverse=True)
    by_first = sorted(found, key=lambda unit: unit.first)
    covered = [user for unit in by_first for user in range(unit.first, unit.stop)]
    assert len(covered) == len(set(covered))
    assert {user for user, cost in enumerate(costs) if cost} <= set(covered)
    assert sum(unit.cost for unit in found) == sum(costs)
    assert len({unit.name for unit in found}) == len(found)
    assert sum(unit.num_users for unit in found) == sum(cost > 0 for cost in costs)
    biggest = max(costs)
    assert all(unit.cost < size + biggest for unit in found)


def test_the_plan_does_not_depend_on_who_runs_it():
    costs = np.random.default_rng(1).integers(0, 100, 500)
    assert plan_units(costs, 700) == plan_units(costs.copy(), 700)


def test_a_pool_without_workers_is_our_mistake():
    with pytest.raises(AssertionError, match="without workers"):
        run(FakePool(0, None), 3)
