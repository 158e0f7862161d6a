"""Joining a Ray cluster, or starting one on this machine, and what fits on its nodes now."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from proper_ds.errors import ConfigError, FleetError, Problem
from proper_ds.fleet.config import FleetConfig
from proper_ds.fleet.worker import KEEPALIVE

ANSWER_TIMEOUT_S, ANSWER_INTERVAL_S = 60.0, 2.0
"""How long a node may take to start a process and answer, as long as Ray takes it for alive."""
RANK_HEALTH = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "30"}
"""When Ray Train takes a rank that gives no sign of life for lost; ten minutes by default."""


@dataclass(frozen=True)
class Node:
    """What one node has."""

    num_cpus: int
    num_gpus: int


@dataclass(frozen=True)
class Cluster:
    """What the cluster has, node by node.

    Attributes:
        nodes: by id, those alive.
        on_gpu: whether stages run on GPUs; settled when the cluster is joined.
        is_ours: whether it was started here and ends with the run; others can grow and shrink.
    """

    nodes: dict[str, Node]
    on_gpu: bool
    is_ours: bool

    def now(self) -> Cluster:
        """The cluster as it is now."""
        return Cluster(_alive_nodes(), self.on_gpu, self.is_ours)

    def answering(self) -> Cluster:
        """Without the nodes that do not answer: Ray can take minutes to tell that a host was cut off."""
        probe = ray.remote(num_cpus=0, max_retries=0)(_answer)
        asked = {
            probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(): node_id
            for node_id in self.nodes
        }
        answered, deadline_s = set(), time.monotonic() + ANSWER_TIMEOUT_S
        while asked and time.monotonic() < deadline_s:
            done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_INTERVAL_S)
            answered |= {asked.pop(ref) for ref in done if _came(ref)}
            alive = _alive_nodes()
            asked = {ref: node_id for ref, node_id in asked.items() if ref not in done and node_id in alive}
        nodes = {node_id: node for node_id, node in self.nodes.items() if node_id in answered}
        return Cluster(nodes, self.on_gpu, self.is_ours)

    def num_actors(self, fleet: FleetConfig) -> int:
        """Actors to keep running: as many as configured, or for `auto` as fit now; one that waits where none fits."""
        return max(1, self.num_fitting(fleet.num_cpus_per_actor)) if fleet.num_actors == "auto" else fleet.num_actors

    def check_actors(self, fleet: FleetConfig) -> None:
        """Raise ConfigError where the configured actors do not fit and never will."""
        fitting = self.num_fitting(fleet.num_cpus_per_actor)
        if not self.is_ours:
            return
        if fitting < 1:
            self._refuse("fleet.num_cpus_per_actor", f"{fleet.num_cpus_per_actor}, but {self}", "Lower it.")
        if self.num_actors(fleet) > fitting:
            mend = f"Use at most {fitting}, `auto`, or a larger cluster."
            self._refuse("fleet.num_actors", f"{fleet.num_actors}, but {self}", mend)

    def check_ranks(self, num_ranks: int, num_cpus_per_rank: int) -> None:
        """Raise ConfigError where so many ranks do not fit."""
        fitting = self.num_fitting(num_cpus_per_rank)
        if num_ranks > fitting:
            mend = f"Use at most {fitting}, or a larger cluster."
            self._refuse("distributed.num_ranks", f"{num_ranks} ranks, but {self}", mend)

    def num_fitting(self, num_cpus: int) -> int:
        """Processes of so many CPUs, and a GPU where there are any, that the nodes hold; none spans two nodes."""
        fitting = (node.num_cpus // num_cpus for node in self.nodes.values())
        if not self.on_gpu:
            return sum(fitting)
        return sum(min(by_cpu, node.num_gpus) for by_cpu, node in zip(fitting, self.nodes.values(), strict=True))

    @staticmethod
    def _refuse(key: str, wrong: str, mend: str) -> None:
        raise ConfigError("cluster", [Problem(key, wrong, mend)])

    def __str__(self) -> str:
        """For messages."""
        cpus, gpus = (sum(getattr(node, n) for node in self.nodes.values()) for n in ("num_cpus", "num_gpus"))
        nodes = f"{len(self.nodes)} node" + ("s" if len(self.nodes) != 1 else "")
        return f"the cluster has {cpus} CPUs and {gpus} GPUs on {nodes}"


def join_environment() -> dict[str, str]:
    """What a process on this machine needs in its environment to join the cluster that this one is in."""
    return dict(os.environ) | {"RAY_ADDRESS": str(ray.get_runtime_context().gcs_address)}


def _answer() -> bool:
    """What a node is asked to run."""
    return True


def _came(ref: ray.ObjectRef) -> bool:
    try:
        return bool(ray.get(ref))
    except ray.exceptions.RayError:
        return False


def _alive_nodes() -> dict[str, Node]:
    found = ((node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"])
    return {node_id: Node(int(has.get("CPU", 0)), int(has.get("GPU", 0))) for node_id, has in found}


@contextmanager
def ray_cluster() -> Iterator[Cluster]:
    """The cluster of $RAY_ADDRESS (set in a Ray job), or one of this machine that ends with the block."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    for name, value in (KEEPALIVE | RANK_HEALTH).items():
        os.environ.setdefault(name, value)
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
        nodes = _alive_nodes()
        yield Cluster(nodes, any(node.num_gpus for node in nodes.values()), not joined)
    finally:
        ray.shutdown()
