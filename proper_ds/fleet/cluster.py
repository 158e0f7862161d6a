"""Joining a Ray cluster, or starting one on this machine, and whether it has room for what is asked."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from proper_ds.errors import ConfigError, FleetError, Problem
from proper_ds.fleet.config import FleetConfig


@dataclass(frozen=True)
class Cluster:
    """What the cluster has in all."""

    num_cpus: int
    num_gpus: int
    cpus_by_node: tuple[int, ...]

    @property
    def on_gpu(self) -> bool:
        """Whether stages run on GPUs."""
        return self.num_gpus > 0

    def num_actors(self, fleet: FleetConfig) -> int:
        """Actors that fit, or as many as configured. Raises ConfigError where those do not fit."""
        fitting = self._fitting(fleet.num_cpus_per_actor)
        if fleet.num_actors == "auto":
            if fitting < 1:
                self._refuse("fleet.num_cpus_per_actor", f"{fleet.num_cpus_per_actor}, but {self}", "Lower it.")
            return fitting
        if fleet.num_actors > fitting:
            mend = f"Use at most {fitting}, `auto`, or a larger cluster."
            self._refuse("fleet.num_actors", f"{fleet.num_actors}, but {self}", mend)
        return fleet.num_actors

    def check_ranks(self, num_ranks: int, num_cpus_per_rank: int) -> None:
        """Raise ConfigError where so many ranks do not fit."""
        fitting = self._fitting(num_cpus_per_rank)
        if num_ranks > fitting:
            mend = f"Use at most {fitting}, or a larger cluster."
            self._refuse("distributed.num_ranks", f"{num_ranks} ranks, but {self}", mend)

    def _fitting(self, num_cpus: int) -> int:
        """Processes of so many CPUs that the nodes can hold; one is never spread over two nodes."""
        return self.num_gpus if self.on_gpu else sum(cpus // num_cpus for cpus in self.cpus_by_node)

    @staticmethod
    def _refuse(key: str, wrong: str, mend: str) -> None:
        raise ConfigError("cluster", [Problem(key, wrong, mend)])

    def __str__(self) -> str:
        """For messages."""
        num_nodes = len(self.cpus_by_node)
        nodes = f"{num_nodes} node" + ("s" if num_nodes != 1 else "")
        return f"the cluster has {self.num_cpus} CPUs and {self.num_gpus} GPUs on {nodes}"


@contextmanager
def ray_cluster() -> Iterator[Cluster]:
    """The cluster of $RAY_ADDRESS (set in a Ray job), or one of this machine that ends with the block."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    joined = bool(os.environ.get("RAY_ADDRESS"))
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address="auto" if joined else "local",
            include_dashboard=None if joined else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
        )
    except (ConnectionError, RuntimeError) as error:
        first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        where = f"the Ray cluster of RAY_ADDRESS={os.environ['RAY_ADDRESS']}" if joined else "a Ray cluster here"
        raise FleetError(
            f"{where} could not be reached ({first}). If it asks for a token, set RAY_AUTH_MODE=token for all of"
            " `ray start`, `ray job submit` and proper-ds (see README, On a cluster)"
        ) from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own prints a stack and ends without a word
    try:
        has = ray.cluster_resources()
        cpus_by_node = tuple(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
        yield Cluster(int(has.get("CPU", 0)), int(has.get("GPU", 0)), cpus_by_node)
    finally:
        ray.shutdown()
