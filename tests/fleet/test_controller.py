"""The controller with a fake fleet: every unit exactly once, retries elsewhere, quarantine, stops, elastic workers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proper_ds.errors import DataError, FleetError, ProperError
from proper_ds.fleet.controller import UNITS_PER_WORKER, Controller, Done, Failed, Lost, Place
from proper_ds.fleet.plan import Unit
from proper_ds.fleet.policy import Decision, Failure, FailurePolicy


class FakePool:
    """Workers that finish, fail or die as `behave(worker, unit)` says; `between` may change them every turn.

    Like the real pool it ends a worker that raised anything but an error of ours. `nodes` are the hosts of the first
    workers; one that takes the place of another runs on the same. A turn takes `turn_s`, one in which nothing happens
    a second.
    """

    turn_s = 0.0

    def __init__(self, num_workers, behave, between=lambda pool: [], nodes=()):
        self._behave, self._between = behave, between
        self.queues, self.nodes, self.num_started = {}, {}, 0
        self.most, self.submitted, self.now_s = 0, [], 0.0
        for n in range(num_workers):
            self.start(nodes[n] if nodes else "node")

    def start(self, node="node"):
        self.queues[self.num_started], self.nodes[self.num_started] = [], node
        self.num_started += 1

    def lose(self, worker, why="killed"):
        del self.queues[worker]
        return Lost(worker, why)

    @property
    def workers(self):
        return list(self.queues)

    def place_of(self, worker):
        assert worker in self.queues
        return Place(self.nodes[worker], f"worker {worker}", f"actor-{worker}.log")

    def submit(self, worker, unit):
        self.queues[worker].append(unit)
        self.submitted.append((worker, unit.first))
        self.most = max(self.most, len(self.queues[worker]))

    def wait(self):
        events = self._between(self)
        for worker in self.turn():
            what = self._behave(worker, self.queues[worker][0])
            if what == "dies":
                events.append(self.lose(worker))
                self.start(self.nodes[worker])
            elif what is None:
                unit = self.queues[worker].pop(0)
                events.append(Done(worker, unit, {"by": worker}))
            else:
                events.append(Failed(worker, self.queues[worker].pop(0), what, not isinstance(what, ProperError)))
                if not isinstance(what, ProperError):
                    self.lose(worker)
                    self.start(self.nodes[worker])
        self.now_s += self.turn_s if events else 1.0
        return events

    def turn(self):
        """The workers whose first unit ends now."""
        return [worker for worker, queue in self.queues.items() if queue][:1]


def units(count):
    return [Unit(n, n + 1, 10, num_users=1) for n in range(count)]


def run(pool, count, max_retries=2, max_quarantined=0, quarantined=None):
    done = []
    policy = FailurePolicy(max_retries, max_quarantined)
    given_up = None if quarantined is None else lambda unit, reason: quarantined.update({unit.first: reason})

    def on_done(unit, report):
        done.append(unit.first)

    Controller(units(count), pool, policy, on_done, given_up, clock=lambda: pool.now_s).run()
    return done


def works(worker, unit):
    return None


def test_every_unit_is_done_once_with_bounded_queues():
    pool = FakePool(3, works)
    assert sorted(run(pool, 20)) == list(range(20))
    assert pool.most <= UNITS_PER_WORKER


def test_no_units_no_work():
    assert run(FakePool(2, works), 0) == []


CHANCES = st.sampled_from(["works"] * 5 + ["dies", "fails", "node lost", "node joins", "nothing", "all lost"])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 4), st.integers(1, 25), st.lists(CHANCES, max_size=120))
def test_whatever_happens_in_whatever_order_every_unit_is_done_exactly_once(num_workers, count, story):
    """The story's events come first, one a turn; then all goes well. Retries are not what is tested here."""
    story = iter(story)
    now = "works"

    def between(pool):
        nonlocal now
        now = next(story, "works")
        if now == "node lost" and len(pool.queues) > 1:
            return [pool.lose(pool.workers[-1], "its node is dead")]
        if now == "all lost":
            return [pool.lose(worker, "its node is dead") for worker in pool.workers]
        if now == "node joins" or not pool.queues:
            pool.start()
        return []

    def behave(worker, unit):
        return {"dies": "dies", "fails": RuntimeError("bad luck")}.get(now)

    pool = FakePool(num_workers, behave, between)
    assert sorted(run(pool, count, max_retries=1000)) == list(range(count))
    assert pool.most <= UNITS_PER_WORKER


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.sets(st.integers(0, 19), max_size=6), st.integers(0, 6))
def test_units_that_always_kill_are_given_up_and_all_others_done_within_the_limit(num_workers, killers, limit):
    pool = FakePool(num_workers, lambda worker, unit: "dies" if unit.first in killers else None)
    quarantined = {}
    if len(killers) > limit:
        with pytest.raises(FleetError, match="failed 3 times"):
            run(pool, 20, 2, limit, quarantined)
        assert len(quarantined) == limit
    else:
        assert sorted(run(pool, 20, 2, limit, quarantined)) == sorted(set(range(20)) - killers)
        assert set(quarantined) == killers
        assert all("failed 3 times" in reason and "its worker was lost" in reason for reason in quarantined.values())


def test_only_the_unit_that_ran_is_blamed_for_a_death():
    died = []

    def behave(worker, unit):
        if unit.first == 0 and len(died) < 2:
            died.append(unit)
            return "dies"
        return None

    pool = FakePool(1, behave)
    assert sorted(run(pool, 6, max_retries=2)) == list(range(6))
    assert pool.num_started == 3


def test_a_unit_that_failed_once_is_alone_at_its_worker_when_tried_again():
    alone = []

    def behave(worker, unit):
        if unit.first == 0:
            alone.append([held.first for held in pool.queues[worker]] == [0])
            return "dies" if len(alone) < 3 else None
        return None

    pool = FakePool(2, behave)
    assert sorted(run(pool, 12)) == list(range(12))
    assert alone == [False, True, True]


class UnevenPool(FakePool):
    """Where everything that runs on a node called "bad" fails in one turn; the others take `slowness` turns a unit.

    With `is_one_host` those nodes are devices of one host.
    """

    turn_s = 1.0  # so that retries are due while there is other work

    def __init__(self, nodes, what, slowness, is_one_host):
        super().__init__(len(nodes), lambda worker, unit: what if self.nodes[worker] == "bad" else None, nodes=nodes)
        self._slowness, self._is_one_host, self._num_turns = slowness, is_one_host, 0

    def place_of(self, worker):
        place = super().place_of(worker)
        return Place("host", place.node, place.log) if self._is_one_host else place

    def turn(self):
        self._num_turns += 1
        busy = [worker for worker, queue in self.queues.items() if queue]
        bad = [worker for worker in busy if self.nodes[worker] == "bad"]
        return bad + ([worker for worker in busy if worker not in bad] if self._num_turns % self._slowness == 0 else [])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", "bad"]), min_size=1, max_size=6),
    st.integers(1, 40),
    st.sampled_from(["dies", RuntimeError("CUDA error"), FleetError("disk full")]),
    st.integers(1, 5),
    st.booleans(),
)
def test_where_everything_fails_at_once_costs_no_unit(nodes, count, what, slowness, is_one_host):
    """A bad host, or a bad device of one host, whatever worker runs there: one retry of each unit is enough."""
    pool = UnevenPool([*nodes, "good"], what, slowness, is_one_host)
    assert sorted(run(pool, count, max_retries=1)) == list(range(count))
    assert pool.most <= UNITS_PER_WORKER


def test_one_bad_worker_among_three_good_ones_costs_none_of_a_thousand_units():
    pool = UnevenPool(["bad", "a", "b", "c"], RuntimeError("CUDA error"), 3, is_one_host=False)
    assert sorted(run(pool, 1000, 3, 10, {})) == list(range(1000))


def test_a_unit_waits_longer_after_each_failure_and_keeps_no_other_waiting():
    tried_s, done_at_first_retry = [], []

    def behave(worker, unit):
        if unit.first == 0:
            tried_s.append(pool.now_s)
            if len(tried_s) == 2:
                done_at_first_retry.extend(n for _, n in pool.submitted)
            return RuntimeError("the disk is away") if len(tried_s) < 4 else None
        return None

    pool = FakePool(2, behave)
    assert sorted(run(pool, 10, max_retries=3)) == list(range(10))
    assert [later - sooner for sooner, later in itertools.pairwise(tried_s)] == [1, 2, 4]
    assert set(done_at_first_retry) == set(range(10))


def test_a_unit_that_is_due_again_gets_the_next_free_worker_of_a_busy_fleet():
    tries = []

    def behave(worker, unit):
        if unit.first == 0:
            tries.append(len(pool.submitted))
            return RuntimeError("away") if len(tries) == 1 else None
        return None

    pool = FakePool(3, behave)
    pool.turn_s = 1.0
    assert sorted(run(pool, 60)) == list(range(60))
    assert tries[1] < 20, "it waited for all the others"


def test_what_was_queued_at_a_worker_that_an_error_ended_is_not_blamed():
    """With no retries at all the queued unit survives."""
    quarantined = {}
    pool = FakePool(1, lambda worker, unit: RuntimeError("no") if unit.first == 0 else None)
    assert sorted(run(pool, 4, 0, 1, quarantined)) == [1, 2, 3]
    assert pool.num_started == 2
    assert set(quarantined) == {0}


def test_the_stored_reason_quotes_no_error():
    quarantined = {}
    pool = FakePool(1, lambda worker, unit: ValueError("user 'ann' says ...") if unit.first == 1 else None)
    run(pool, 3, 1, 1, quarantined)
    unit = "unit-0000000001-0000000002"
    assert quarantined == {1: f"{unit} failed 2 times, the last time because of ValueError; see logs/actor-1.log"}


def test_a_lost_worker_gets_nothing_more_and_a_new_one_gets_work():
    def between(pool):
        if len(pool.submitted) == 2 * UNITS_PER_WORKER and 0 in pool.queues:
            pool.start()
            return [pool.lose(0)]
        return []

    pool = FakePool(2, works, between)
    assert sorted(run(pool, 12)) == list(range(12))
    last_of_0 = max(n for n, (worker, _) in enumerate(pool.submitted) if worker == 0)
    first_of_2 = min(n for n, (worker, _) in enumerate(pool.submitted) if worker == 2)
    assert last_of_0 < first_of_2


def test_a_unit_that_kills_its_worker_again_and_again_stops_a_run_that_gives_up_none():
    pool = FakePool(2, lambda worker, unit: "dies" if unit.first == 3 else None)
    with pytest.raises(FleetError, match=r"unit-0000000003-0000000004 failed 3 times.*its worker was lost \(killed\)"):
        run(pool, 6, max_retries=2)


def test_a_fault_of_the_users_stops_at_once_even_where_units_may_be_given_up():
    tries, quarantined = [], {}

    def behave(worker, unit):
        tries.append(unit)
        return DataError("no such column") if unit.first == 0 else None

    with pytest.raises(DataError, match="no such column"):
        run(FakePool(1, behave), 5, 5, 5, quarantined)
    assert len(tries) == 1
    assert not quarantined


def test_decisions():
    policy = FailurePolicy(max_retries=1, max_quarantined=10)
    assert policy.decide(Failure("u", None, 1, 4)) is Decision.RETRY
    assert policy.decide(Failure("u", RuntimeError(), 2, 4)) is Decision.QUARANTINE
    assert policy.decide(Failure("u", RuntimeError(), 2, 4, num_quarantined=6)) is Decision.QUARANTINE
    assert policy.decide(Failure("u", RuntimeError(), 2, 4, num_quarantined=7)) is Decision.STOP
    assert policy.decide(Failure("u", DataError(), 1, 4)) is Decision.STOP
    assert FailurePolicy(1).decide(Failure("u", None, 2, 0)) is Decision.STOP


def test_units_that_nobody_may_give_up_are_our_mistake():
    with pytest.raises(AssertionError, match="nobody to tell"):
        run(FakePool(1, works), 3, max_quarantined=1)
