"""Hands units to workers until all are done: back-pressure, retries elsewhere, quarantine. One turn is `step`.

Knows neither ray nor what a unit does; `pool.py` brings real actors, tests bring fakes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from proper_ds.errors import FleetError, ProperError
from proper_ds.fleet.plan import Unit
from proper_ds.fleet.policy import Decision, Failure, FailurePolicy
from proper_ds.observe.log import get_logger

UNITS_PER_WORKER = 2
"""One runs, one waits at the worker, so that it never idles for a message."""


@dataclass(frozen=True)
class Done:
    """A worker has finished a unit; `report` is what its job returned."""

    worker: int
    unit: Unit
    report: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """A unit raised an error.

    Attributes:
        ends_worker: whether the pool has ended its worker, whose process may be spoilt, with all else that it held.
    """

    worker: int
    unit: Unit
    error: BaseException
    ends_worker: bool = False


@dataclass(frozen=True)
class Lost:
    """A worker is gone with all it held, and why: killed, out of memory, its node dead or out of reach."""

    worker: int
    why: str


Event = Done | Failed | Lost


@dataclass(frozen=True)
class Place:
    """Where a worker runs.

    Attributes:
        node: its host.
        device: what of the host it has for itself, such as a GPU; the worker itself where that is only its process.
        log: the name of its log's file.
    """

    node: str
    device: str
    log: str


class Pool(Protocol):
    """Workers that come and go. Each has a number, which no later one gets again."""

    @property
    def workers(self) -> Sequence[int]:
        """Those that take units now; one leaves the list only with a `Lost`, or a `Failed` that ends it."""

    def place_of(self, worker: int) -> Place:
        """Where one of `workers` runs, all its life."""

    def submit(self, worker: int, unit: Unit) -> None:
        """Send a unit to a worker, which runs its units in the order they come; returns at once."""

    def wait(self) -> list[Event]:
        """What has happened, in order; waits a bounded time for something, and may return nothing.

        Raises:
            FleetError: where there has been no worker for too long.
        """


@dataclass
class _Past:
    """What a unit that failed has behind it: how often, where (nodes and devices), and when it is due again."""

    num_attempts: int
    places: set[str]
    due_s: float


class Controller:
    """See the module's docstring.

    Args:
        on_done: called with each finished unit and its report.
        on_quarantined: called with each unit that is given up and the reason, which quotes no error: that may name
            users; without it, none is.
        clock: seconds since whenever.
    """

    def __init__(
        self,
        units: Iterable[Unit],
        pool: Pool,
        policy: FailurePolicy,
        on_done: Callable[[Unit, dict[str, Any]], None],
        on_quarantined: Callable[[Unit, str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert on_quarantined is not None or policy.max_quarantined == 0, "nobody to tell of quarantined units"
        self._waiting, self._again = deque(units), list[Unit]()
        self._pool, self._policy, self._on_done, self._on_quarantined = pool, policy, on_done, on_quarantined
        self._clock = clock
        self._at: dict[int, deque[Unit]] = {}
        self._places: dict[int, Place] = {}
        self._past: dict[tuple[str, str], _Past] = {}
        self._num_quarantined = 0

    def step(self) -> bool:
        """Dispatch what fits, take in what has happened; True while there is work left.

        Raises:
            ProperError: what a unit raised, where the policy says stop; FleetError for other causes.
        """
        self._dispatch()
        if not self._is_busy():
            return False
        for event in self._pool.wait():
            match event:
                case Done(worker, unit, report):
                    self._at[worker].remove(unit)
                    self._past.pop(_key(unit), None)
                    self._on_done(unit, report)
                case Failed(worker, unit, error, ends_worker):
                    self._at[worker].remove(unit)
                    place = self._places[worker]
                    if ends_worker:
                        self._take_back(worker)
                    self._fail(unit, place, error, f"{type(error).__name__}: {error}")
                case Lost(worker, why):
                    self._lose(worker, why)
        return self._is_busy()

    def _is_busy(self) -> bool:
        return bool(self._waiting) or bool(self._again) or any(self._at.values())

    def _dispatch(self) -> None:
        workers = self._pool.workers
        for worker in workers:
            if worker not in self._at:
                self._at[worker], self._places[worker] = deque(), self._pool.place_of(worker)
        kept_free = self._dispatch_again(workers)
        for depth in range(1, UNITS_PER_WORKER + 1):  # nobody queues a second unit while another worker has none
            for worker in workers:
                held = self._at[worker]
                is_free = worker not in kept_free and not any(_key(unit) in self._past for unit in held)
                if self._waiting and is_free and len(held) < depth:
                    self._submit(worker, self._waiting.popleft())

    def _dispatch_again(self, workers: Sequence[int]) -> set[int]:
        """Send units that failed where they failed least; returns the workers that get nothing else for their sake.

        Such a unit waits for its turn there even where another worker is idle: that may be the broken one. It is alone
        at its worker: one that dies at once may take the news of the unit before along, which is blamed then.
        """
        kept_free: set[int] = set()
        now_s = self._clock()
        for unit in [unit for unit in self._again if self._past[_key(unit)].due_s <= now_s]:
            if len(kept_free) == len(workers):
                break
            failed_at = self._past[_key(unit)].places
            failures = {
                n: sum(at in failed_at for at in (self._places[n].node, self._places[n].device)) for n in workers
            }
            fewest = min(failures.values())
            best = [n for n in workers if failures[n] == fewest and n not in kept_free]
            if not best:
                continue
            worker = min(best, key=lambda n: len(self._at[n]))
            kept_free.add(worker)
            if not self._at[worker]:
                self._again.remove(unit)
                self._submit(worker, unit)
        return kept_free

    def _submit(self, worker: int, unit: Unit) -> None:
        self._at[worker].append(unit)
        self._pool.submit(worker, unit)

    def _lose(self, worker: int, why: str) -> None:
        held, place = self._at.get(worker), self._places.get(worker)
        if not held or place is None:
            self._take_back(worker)
            get_logger().warning("worker %d is lost (%s)", worker, why)
            return
        running = held.popleft()
        self._take_back(worker)
        self._fail(running, place, None, f"its worker was lost ({why})")

    def _take_back(self, worker: int) -> None:
        """Put what was only queued at a worker that is gone, through no fault of its own, where it was."""
        self._places.pop(worker, None)
        for unit in reversed(self._at.pop(worker, deque())):
            self._waiting.appendleft(unit)

    def _fail(self, unit: Unit, place: Place, error: BaseException | None, why: str) -> None:
        key, name = _key(unit), f"{unit.part} {unit.name}".strip()
        past = self._past.setdefault(key, _Past(0, set(), 0.0))
        past.num_attempts += 1
        past.places |= {place.node, place.device}
        attempts = past.num_attempts
        decision = self._policy.decide(Failure(name, error, attempts, unit.num_users, self._num_quarantined))
        if decision is Decision.RETRY:
            pause_s = self._policy.pause_s(attempts)
            get_logger().warning("%s will be tried again in %g s (attempt %d): %s", name, pause_s, attempts + 1, why)
            past.due_s = self._clock() + pause_s
            self._again.append(unit)
            return
        failed = f"{name} failed {attempts} times, the last time because"
        if decision is Decision.QUARANTINE:
            assert self._on_quarantined is not None
            get_logger().error("%s %s; its %d users are given up, the run goes on", failed, why, unit.num_users)
            self._num_quarantined += unit.num_users
            del self._past[key]
            kind = f"of {type(error).__name__}" if error is not None else "its worker was lost"
            self._on_quarantined(unit, f"{failed} {kind}; see logs/{place.log}")
            return
        if isinstance(error, ProperError):
            raise error
        raise FleetError(f"{failed} {why}{self._policy.about_limit(self._num_quarantined)}")

    def run(self) -> None:
        """Step until nothing is left."""
        while self.step():
            pass


def _key(unit: Unit) -> tuple[str, str]:
    return unit.part, unit.name
