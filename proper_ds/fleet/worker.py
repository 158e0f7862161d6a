"""The actor: a thin shell round a job that knows what a unit is. It is told the job's name, and builds it once."""

from __future__ import annotations

import importlib
import os
import time
from typing import TYPE_CHECKING, Any, Protocol

import ray
import torch

from proper_ds.fleet.plan import Unit
from proper_ds.observe.log import get_logger, log_to_file
from proper_ds.run_folder import RunFolder

if TYPE_CHECKING:
    from proper_ds.config import RunConfig

KEEPALIVE = {"RAY_grpc_client_keepalive_time_ms": "5000", "RAY_grpc_client_keepalive_timeout_ms": "5000"}
"""Ray notices a host that is cut off by these; every process of a cluster must have them (cluster/ray.env)."""
WATCH = "watch"
"""The concurrency group of an actor's signs of life, which it gives while a unit runs."""


class Job(Protocol):
    """What an actor runs: made once on its device, then called unit by unit."""

    def run(self, unit: Unit) -> dict[str, Any]:
        """Work through the unit, commit its result, and report numbers."""


def resolve(entry: str) -> Any:
    """The object that `package.module:name` names."""
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


def _make_reproducible() -> None:
    """Have CUDA compute the same bits from the same unit; before the first call of CUDA.

    A unit may be trained twice, after a loss or because its worker was only out of reach, and both must be the same.
    By default `index_add_` adds in any order, and cuBLAS may take another algorithm from call to call. What has no
    deterministic kind only warns, so that no unit fails for it. One of these is the backward of memory-efficient
    attention, which is deterministic only with `warn_only=False`.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True, warn_only=True)


class UnitWorker:
    """Runs units of one job in one process."""

    def __init__(self, entry: str, config: RunConfig, options: dict[str, Any], who: str) -> None:
        torch.set_num_threads(config.fleet.num_threads_per_actor)
        log_to_file(RunFolder(config.output_path).logs, who)
        self._entry, self._config, self._options = entry, config, options
        self._job: Job | None = None

    @ray.method(concurrency_group=WATCH)
    def whereabouts(self) -> tuple[str, str, bool]:
        """A sign of life: (its node's id, its GPUs' ids or "", whether Ray was started there with KEEPALIVE)."""
        here = ray.get_runtime_context()
        gpus = ",".join(here.get_accelerator_ids().get("GPU", []))
        return here.get_node_id(), gpus, all(name in os.environ for name in KEEPALIVE)

    def run(self, unit: Unit) -> dict[str, Any]:
        """The job's report. The job is built with the first unit, so that its errors arrive as a unit's."""
        if self._job is None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            if device.type == "cuda":
                _make_reproducible()
            self._job = resolve(self._entry)(self._config, device, **self._options)
            get_logger().info("ready on %s", device)
        start_s = time.perf_counter()
        report = self._job.run(unit)
        get_logger().info("%s %s: %.1f s", unit.part, unit.name, time.perf_counter() - start_s)
        return report
