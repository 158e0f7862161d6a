"""Ray actors as the controller's pool of workers: as many as the cluster holds, watched, and replaced where lost.

Ray itself may take minutes to tell of a host that was cut off. So actors are asked for signs of life, and one that
gives none is treated as lost. Should it be alive after all, what it commits is the same, bit for bit, as what its
replacement does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError

from proper_ds.errors import FleetError, ProperError
from proper_ds.fleet.cluster import Cluster
from proper_ds.fleet.controller import Done, Event, Failed, Lost, Place
from proper_ds.fleet.plan import Unit
from proper_ds.fleet.worker import KEEPALIVE, WATCH, UnitWorker
from proper_ds.observe.log import get_logger

if TYPE_CHECKING:
    from proper_ds.config import RunConfig

WAIT_S = 1.0
WATCH_S = 2.5
"""Seconds between two looks at the nodes and the signs of life."""
MOST_PAUSE_S = 60.0


@dataclass
class _Actor:
    """One actor.

    Attributes:
        slot: which of the wanted actors it is; its log is called after it, as those of the ones before it were.
        node: the node it runs on; empty until it has given its first sign of life.
        gpus: which of the node's GPUs are its own.
        sign: the sign of life that is awaited, if any.
        num_missed: looks in a row at which that one had not come. Counting looks rather than seconds spares the
            actors where it was the driver that stood still.
    """

    slot: int
    handle: Any
    sign: ray.ObjectRef | None
    node: str = ""
    gpus: str = ""
    num_missed: int = 0


@dataclass
class _Slot:
    """A place for one actor after the other.

    Attributes:
        num_ended: actors in a row that could not start, were lost or were ended, with no unit done in between.
        due_s: when the next one may start.
    """

    num_ended: int = 0
    due_s: float = 0.0

    def end(self, now_s: float, most_s: float) -> None:
        """Note that its actor has ended: the next may start after a look's time, doubled with each, up to `most_s`."""
        self.num_ended += 1
        self.due_s = now_s + min(most_s, WATCH_S * 2 ** min(self.num_ended - 1, 10))


class RayPool:
    """See Pool. Numbers count the actors ever started."""

    def __init__(self, entry: str, config: RunConfig, options: dict[str, Any], stage: str, cluster: Cluster) -> None:
        cluster.check_actors(config.fleet)
        self._entry, self._config, self._options, self._stage = entry, config, options, stage
        self._cluster = cluster
        self._num_started = self._num_failed_starts = 0
        self._actors: dict[int, _Actor] = {}
        self._slots: dict[int, _Slot] = {}
        self._running: dict[ray.ObjectRef, tuple[int, Unit]] = {}
        self._next_look_s = self._last_ready_s = time.monotonic()
        self._failed_start, self._has_worked, self._warned_of = "", False, set[str]()
        self._remote = ray.remote(
            num_cpus=config.fleet.num_cpus_per_actor,
            num_gpus=1 if cluster.on_gpu else 0,
            scheduling_strategy="SPREAD",
            concurrency_groups={WATCH: 1},
        )(UnitWorker)

    @property
    def workers(self) -> list[int]:
        """See Pool."""
        return [number for number, actor in self._actors.items() if actor.node]

    def place_of(self, worker: int) -> Place:
        """See Pool."""
        actor = self._actors[worker]
        device = f"{actor.node} GPU {actor.gpus}" if actor.gpus else f"{actor.node} actor {worker}"
        return Place(actor.node, device, f"{self._who(actor.slot)}.log")

    def _who(self, slot: int) -> str:
        return f"{self._stage}-actor-{slot}"

    def submit(self, worker: int, unit: Unit) -> None:
        """See Pool."""
        self._running[self._actors[worker].handle.run.remote(unit)] = (worker, unit)

    def wait(self) -> list[Event]:
        """See Pool."""
        events = self._results()  # before a look, which would drop those of an actor found dead
        if time.monotonic() >= self._next_look_s:
            events += self._look()
            self._next_look_s = time.monotonic() + WATCH_S
        starting = [actor.sign for actor in self._actors.values() if not actor.node]
        awaited = [*self._running, *starting]
        if awaited:
            ray.wait(awaited, num_returns=1, timeout=0 if events else WAIT_S)
        else:
            time.sleep(WAIT_S)
        events += self._results()
        events += self._signs(is_look=False)
        self._check_that_some_work()
        return events

    def _results(self) -> list[Event]:
        events: list[Event] = []
        for ref in _split(list(self._running))[0]:
            if ref not in self._running:  # its worker turned out to be lost, just now
                continue
            worker, unit = self._running[ref]
            try:
                events.append(Done(worker, unit, ray.get(ref)))
                self._slots[self._actors[worker].slot] = _Slot()
            except RayTaskError as error:
                get_logger().error("%s %s: %s", self._stage, unit.name, error)
                cause = error.cause  # the plain error: what Ray makes of it has a traceback for its message
                raised = cause if isinstance(cause, Exception) else error
                is_ours = isinstance(raised, ProperError)
                events.append(Failed(worker, unit, raised, ends_worker=not is_ours))
                if not is_ours:  # after an error of CUDA, among others, the process computes nothing more
                    self._lose(worker, "")
            except RayError as error:  # killed, its node lost, out of memory
                events.append(self._lose(worker, _last_line(error)))
            self._running.pop(ref, None)
        return events

    def _look(self) -> list[Event]:
        """Look after the actors: drop those without a sign of life, start those that fit, ask all for a sign."""
        nodes = self._cluster.now()
        events: list[Event] = [
            self._lose(number, "its node is dead")
            for number, actor in list(self._actors.items())
            if actor.node and actor.node not in nodes.nodes
        ]
        events += self._signs(is_look=True)
        self._resize(nodes.num_actors(self._config.fleet))
        return events

    def _signs(self, is_look: bool) -> list[Event]:
        """Take in signs of life; at a look, also count those that miss and ask for new ones."""
        asked = {actor.sign: number for number, actor in self._actors.items() if actor.sign is not None}
        ready, missing = _split(list(asked))
        events: list[Event] = []
        for ref in ready:
            actor = self._actors[asked[ref]]
            try:
                node, gpus, has_keepalive = ray.get(ref)
            except RayError as error:
                events += self._lose_or_give_up(asked[ref], error)
                continue
            if not actor.node:
                self._has_worked = True
                self._warn_of_keepalive(node, has_keepalive)
            actor.node, actor.gpus, actor.sign, actor.num_missed = node, gpus, None, 0
        if is_look:
            for ref in missing:
                actor = self._actors[asked[ref]]
                actor.num_missed += bool(actor.node)  # one that has no room yet cannot answer
                if actor.num_missed >= math.ceil(self._config.fleet.ping_timeout_s / WATCH_S):
                    why = f"no sign of life for {self._config.fleet.ping_timeout_s:g} s"
                    events.append(self._lose(asked[ref], why))
            for actor in self._actors.values():
                if actor.sign is None:
                    actor.sign = actor.handle.whereabouts.remote()
        return events

    def _lose_or_give_up(self, number: int, error: RayError) -> list[Event]:
        if self._actors[number].node:
            return [self._lose(number, _last_line(error))]
        self._lose(number, "")
        self._num_failed_starts += 1
        self._failed_start = _last_line(error)
        get_logger().warning("%s: an actor could not start (%s)", self._stage, self._failed_start)
        if self._num_failed_starts > self._config.fleet.max_retries and not self._has_worked:
            raise FleetError(
                f"{self._stage}: none of {self._num_failed_starts} actors could start, the last one because"
                f" {self._failed_start}"
            )
        return []

    def _lose(self, number: int, why: str) -> Lost:
        actor = self._actors.pop(number)
        self._running = {ref: held for ref, held in self._running.items() if held[0] != number}
        ray.kill(actor.handle)  # it may only be out of reach, and would keep its place
        self._slots[actor.slot].end(time.monotonic(), min(MOST_PAUSE_S, self._config.fleet.start_timeout_s / 4))
        return Lost(number, why)

    def _resize(self, num_wanted: int) -> None:
        """Start actors up to so many. Where there are more, those without room go; none is taken from its work.

        One that could not start, or failed, is started again after a pause that doubles, whatever the others do.
        """
        taken = {actor.slot for actor in self._actors.values()}
        free = [slot for slot in range(num_wanted) if slot not in taken][: max(0, num_wanted - len(self._actors))]
        for slot in free:
            if time.monotonic() < self._slots.setdefault(slot, _Slot()).due_s:
                continue
            handle = self._remote.remote(self._entry, self._config, self._options, self._who(slot))
            self._actors[self._num_started] = _Actor(slot, handle, handle.whereabouts.remote())
            self._num_started += 1
        without_room = [number for number, actor in self._actors.items() if not actor.node]
        for number in without_room[: max(0, len(self._actors) - num_wanted)]:
            ray.kill(self._actors.pop(number).handle)

    def _check_that_some_work(self) -> None:
        timeout_s = self._config.fleet.start_timeout_s
        if self.workers:
            self._last_ready_s = time.monotonic()
        elif time.monotonic() - self._last_ready_s > timeout_s:
            why = f" (the last one that tried: {self._failed_start})" if self._failed_start else ""
            raise FleetError(
                f"{self._stage}: no actor could start within fleet.start_timeout_s = {timeout_s:g}{why}:"
                f" the cluster is busy or gone ({self._cluster.now()}). Run the same command again when it has room"
            )

    def _warn_of_keepalive(self, node: str, has_keepalive: bool) -> None:
        if not has_keepalive and node not in self._warned_of:
            self._warned_of.add(node)
            get_logger().warning(
                "Ray was started on node %s without %s: a loss of its network is noticed late. See cluster/ray.env",
                node[:8],
                " and ".join(KEEPALIVE),
            )

    def close(self) -> None:
        """End the actors; what they committed stays."""
        for actor in self._actors.values():
            ray.kill(actor.handle)


def _split(refs: list[ray.ObjectRef]) -> tuple[list[ray.ObjectRef], list[ray.ObjectRef]]:
    """(those that are there, those that are not), each in their order."""
    return ray.wait(refs, num_returns=len(refs), timeout=0) if refs else ([], [])


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


@contextmanager
def ray_pool(entry: str, config: RunConfig, options: dict[str, Any], stage: str, cluster: Cluster) -> Iterator[RayPool]:
    """A pool that ends with the block."""
    pool = RayPool(entry, config, options, stage, cluster)
    try:
        yield pool
    finally:
        pool.close()
