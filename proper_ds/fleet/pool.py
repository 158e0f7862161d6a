"""Ray actors as the controller's pool of workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError

from proper_ds.errors import FleetError
from proper_ds.fleet.cluster import Cluster
from proper_ds.fleet.controller import Outcome
from proper_ds.fleet.plan import Unit
from proper_ds.fleet.worker import UnitWorker
from proper_ds.observe.log import get_logger

if TYPE_CHECKING:
    from proper_ds.config import RunConfig

WAIT_S = 1.0


class RayPool:
    """Numbered actors, each running units one after another."""

    def __init__(self, entry: str, config: RunConfig, options: dict[str, Any], stage: str, cluster: Cluster) -> None:
        self._entry, self._config, self._options, self._stage = entry, config, options, stage
        self._on_gpu = cluster.on_gpu
        self._num_started = 0
        self._running: dict[ray.ObjectRef, tuple[int, Unit]] = {}
        self._actors = [self._start() for _ in range(cluster.num_actors(config.fleet))]
        self._await_the_first()

    def _start(self) -> Any:
        who = f"{self._stage} actor {self._num_started}"
        self._num_started += 1
        fleet = self._config.fleet
        remote = ray.remote(num_cpus=fleet.num_cpus_per_actor, num_gpus=1 if self._on_gpu else 0)(UnitWorker)
        return remote.remote(self._entry, self._config, self._options, who)

    def _await_the_first(self) -> None:
        """Raise FleetError where no actor finds room in time; one that dies at once counts as started."""
        timeout_s = self._config.fleet.start_timeout_s
        started, _ = ray.wait([actor.__ray_ready__.remote() for actor in self._actors], timeout=timeout_s)
        if not started:
            self.close()
            raise FleetError(
                f"{self._stage}: no actor could start within fleet.start_timeout_s = {timeout_s:g}:"
                " the cluster is busy. Run the same command again when it has room"
            )

    @property
    def num_workers(self) -> int:
        """See Pool."""
        return len(self._actors)

    def submit(self, worker: int, unit: Unit) -> None:
        """See Pool."""
        self._running[self._actors[worker].run.remote(unit)] = (worker, unit)

    def wait(self) -> list[Outcome]:
        """See Pool."""
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=WAIT_S)
        outcomes = []
        for ref in ready:
            worker, unit = self._running.pop(ref)
            try:
                outcomes.append(Outcome(worker, unit, ray.get(ref)))
            except RayTaskError as error:
                cause = error.as_instanceof_cause()
                get_logger().error("%s %s: %s", self._stage, unit.name, error)
                outcomes.append(Outcome(worker, unit, None, cause))
            except RayError as error:  # killed, its node lost, out of memory, no start
                outcomes.append(Outcome(worker, unit, None, loss=_last_line(error)))
        return outcomes

    def replace(self, worker: int) -> None:
        """See Pool."""
        self._running = {ref: held for ref, held in self._running.items() if held[0] != worker}
        ray.kill(self._actors[worker])  # it may only have been out of reach, and would keep its place
        self._actors[worker] = self._start()

    def close(self) -> None:
        """End the actors; what they committed stays."""
        for actor in self._actors:
            ray.kill(actor)


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
