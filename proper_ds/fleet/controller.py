"""Hands units to workers until all are done: back-pressure, retries, progress. One turn of the loop is `step`.

Knows neither ray nor what a unit does; `pool.py` brings real actors, tests bring fakes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from proper_ds.errors import FleetError, ProperError
from proper_ds.fleet.plan import Unit
from proper_ds.fleet.policy import Decision, Failure, FailurePolicy
from proper_ds.observe.log import get_logger

UNITS_PER_WORKER = 2
"""One runs, one waits at the worker, so that it never idles for a message."""


@dataclass(frozen=True)
class Outcome:
    """How one dispatched unit ended.

    Attributes:
        worker: number of the worker that had it.
        report: what the job returned; None where it failed.
        error: what it raised; None where the worker died.
        loss: what is known of a worker's death.
    """

    worker: int
    unit: Unit
    report: dict[str, Any] | None
    error: BaseException | None = None
    loss: str = ""


class Pool(Protocol):
    """Workers, numbered from 0."""

    @property
    def num_workers(self) -> int:
        """How many there are."""

    def submit(self, worker: int, unit: Unit) -> None:
        """Send a unit to a worker; returns at once."""

    def wait(self) -> list[Outcome]:
        """Outcomes that have come in; waits a bounded time for at least one."""

    def replace(self, worker: int) -> None:
        """Start a new worker in place of a dead one."""


class Controller:
    """See the module's docstring.

    Args:
        on_done: called with each finished unit and its report.
    """

    def __init__(
        self,
        units: Iterable[Unit],
        pool: Pool,
        policy: FailurePolicy,
        on_done: Callable[[Unit, dict[str, Any]], None],
    ) -> None:
        assert pool.num_workers > 0, "a pool without workers never ends its units"
        self._waiting = deque(units)
        self._pool, self._policy, self._on_done = pool, policy, on_done
        self._at: list[list[Unit]] = [[] for _ in range(pool.num_workers)]
        self._attempts: dict[str, int] = {}

    def step(self) -> bool:
        """Dispatch what fits, take in what has ended; True while there is work left.

        Raises:
            ProperError: what a unit raised, where the policy says stop; FleetError for other causes.
        """
        for worker, units in enumerate(self._at):
            while self._waiting and len(units) < UNITS_PER_WORKER:
                # the last units are spread: nobody queues a second one while another worker has none
                if units and len(self._waiting) <= sum(not other for other in self._at):
                    break
                unit = self._waiting.popleft()
                units.append(unit)
                self._pool.submit(worker, unit)
        if not any(self._at):
            return False
        dead = set()
        for outcome in self._pool.wait():
            self._at[outcome.worker].remove(outcome.unit)
            if outcome.report is not None:
                self._on_done(outcome.unit, outcome.report)
            else:
                self._fail(outcome)
                if outcome.error is None:
                    dead.add(outcome.worker)
        for worker in sorted(dead):
            # whatever else was queued there died with it, through no fault of its own
            self._waiting.extendleft(self._at[worker])
            self._at[worker] = []
            self._pool.replace(worker)
        return bool(self._waiting) or any(self._at)

    def _fail(self, outcome: Outcome) -> None:
        name = f"{outcome.unit.part} {outcome.unit.name}".strip()
        self._attempts[name] = self._attempts.get(name, 0) + 1
        failure = Failure(name, outcome.error, self._attempts[name])
        if outcome.error is None:
            why = "its worker died" + (f" ({outcome.loss})" if outcome.loss else "")
        else:
            why = f"{type(outcome.error).__name__}: {outcome.error}"
        if self._policy.decide(failure) is Decision.STOP:
            if isinstance(outcome.error, ProperError):
                raise outcome.error
            raise FleetError(f"{name} failed {failure.num_attempts} times, the last time because {why}")
        get_logger().warning("%s will be tried again (attempt %d): %s", name, failure.num_attempts + 1, why)
        self._waiting.appendleft(outcome.unit)

    def run(self) -> None:
        """Step until nothing is left."""
        while self.step():
            pass
