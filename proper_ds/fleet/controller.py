"""Hands units to workers until all are done: back-pressure, retries, quarantine. One turn of the loop is `step`.

Knows neither ray nor what a unit does; `pool.py` brings real actors, tests bring fakes.
"""

from __future__ import annotations

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
    """A unit raised an error; its worker lives on."""

    worker: int
    unit: Unit
    error: BaseException


@dataclass(frozen=True)
class Lost:
    """A worker is gone with all it held, and why: killed, out of memory, its node dead or out of reach."""

    worker: int
    why: str


Event = Done | Failed | Lost


class Pool(Protocol):
    """Workers that come and go. Each has a number, which no later one gets again."""

    @property
    def workers(self) -> Sequence[int]:
        """Those that take units now; one leaves the list only with a `Lost`."""

    def submit(self, worker: int, unit: Unit) -> None:
        """Send a unit to a worker, which runs its units in the order they come; returns at once."""

    def wait(self) -> list[Event]:
        """What has happened, in order; waits a bounded time for something, and may return nothing.

        Raises:
            FleetError: where there has been no worker for too long.
        """


class Controller:
    """See the module's docstring.

    Args:
        on_done: called with each finished unit and its report.
        on_quarantined: called with each unit that is given up and the reason; without it, none is.
    """

    def __init__(
        self,
        units: Iterable[Unit],
        pool: Pool,
        policy: FailurePolicy,
        on_done: Callable[[Unit, dict[str, Any]], None],
        on_quarantined: Callable[[Unit, str], None] | None = None,
    ) -> None:
        assert on_quarantined is not None or policy.max_quarantined == 0, "nobody to tell of quarantined units"
        self._waiting = deque(units)
        self._pool, self._policy, self._on_done, self._on_quarantined = pool, policy, on_done, on_quarantined
        self._at: dict[int, deque[Unit]] = {}
        self._attempts: dict[tuple[str, str], int] = {}
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
                    self._attempts.pop(_key(unit), None)
                    self._on_done(unit, report)
                case Failed(worker, unit, error):
                    self._at[worker].remove(unit)
                    self._fail(unit, error, f"{type(error).__name__}: {error}")
                case Lost(worker, why):
                    self._lose(worker, why)
        return self._is_busy()

    def _is_busy(self) -> bool:
        return bool(self._waiting) or any(self._at.values())

    def _dispatch(self) -> None:
        workers = self._pool.workers
        for depth in range(1, UNITS_PER_WORKER + 1):  # nobody queues a second unit while another worker has none
            for worker in workers:
                held = self._at.setdefault(worker, deque())
                if self._waiting and len(held) < self._depth(held, depth):
                    unit = self._waiting.popleft()
                    held.append(unit)
                    self._pool.submit(worker, unit)

    def _depth(self, held: deque[Unit], depth: int) -> int:
        """How many units a worker that holds `held` may have: one that failed before is alone.

        A worker that dies at once may take the news of the unit before along; that one is blamed then. Alone, only
        the deadly unit is.
        """
        return 1 if any(_key(unit) in self._attempts for unit in [self._waiting[0], *held]) else depth

    def _lose(self, worker: int, why: str) -> None:
        held = self._at.pop(worker, deque())
        if not held:
            get_logger().warning("worker %d is lost (%s)", worker, why)
            return
        running = held.popleft()
        self._waiting.extendleft(reversed(held))  # what was only queued there died through no fault of its own
        self._fail(running, None, f"its worker was lost ({why})")

    def _fail(self, unit: Unit, error: BaseException | None, why: str) -> None:
        key, name = _key(unit), f"{unit.part} {unit.name}".strip()
        attempts = self._attempts[key] = self._attempts.get(key, 0) + 1
        decision = self._policy.decide(Failure(name, error, attempts, unit.num_users, self._num_quarantined))
        if decision is Decision.RETRY:
            get_logger().warning("%s will be tried again (attempt %d): %s", name, attempts + 1, why)
            self._waiting.appendleft(unit)
            return
        reason = f"{name} failed {attempts} times, the last time because {why}"
        if decision is Decision.QUARANTINE:
            assert self._on_quarantined is not None
            get_logger().error("%s; its %d users are given up, the run goes on", reason, unit.num_users)
            self._num_quarantined += unit.num_users
            del self._attempts[key]
            self._on_quarantined(unit, reason)
            return
        if isinstance(error, ProperError):
            raise error
        raise FleetError(f"{reason}{self._policy.about_limit(self._num_quarantined)}")

    def run(self) -> None:
        """Step until nothing is left."""
        while self.step():
            pass


def _key(unit: Unit) -> tuple[str, str]:
    return unit.part, unit.name
