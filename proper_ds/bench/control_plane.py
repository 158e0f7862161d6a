"""How fast plan, dispatch, commit and catalog are when training takes no time. For `proper-ds bench control-plane`.

Real actors, the real controller, real durable commits; only the kernel is left out, and an adapter has 16 numbers. The
run is stopped half-way with units in flight and begun anew, as after the loss of a driver.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch

from proper_ds.bench.harness import machine, tell, write_result
from proper_ds.config import RunConfig
from proper_ds.fleet.cluster import ray_cluster
from proper_ds.fleet.config import FleetConfig
from proper_ds.fleet.controller import Controller
from proper_ds.fleet.plan import Unit, plan_units
from proper_ds.fleet.policy import FailurePolicy
from proper_ds.fleet.pool import RayPool, ray_pool
from proper_ds.model.lora import LoraLayout, ModuleShape
from proper_ds.observe.metrics import MetricsFile
from proper_ds.store.catalog import Catalog
from proper_ds.store.store import AdapterStore

LAYOUT = LoraLayout((ModuleShape("none", 4, 4),), r=2, lora_alpha=2)
MEAN_LOG_TOKENS, SPREAD_LOG_TOKENS = 6.0, 1.0
"""Tokens of a user's history: lognormal, 665 on average."""
SAMPLE_S = 1.0


def key_of(user: int) -> str:
    """The key of a made-up user."""
    return f"user-{user:09d}"


class NoTrainingJob:
    """Commits an adapter for each user of a unit without training it."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._store = AdapterStore(config.output_path / "store")

    def run(self, unit: Unit) -> dict[str, Any]:
        """See Job."""
        rows_NP = torch.arange(unit.first + 1, unit.stop + 1).unsqueeze(1).expand(-1, LAYOUT.num_parameters).float()
        adapters = {key_of(unit.first + number): row_P for number, row_P in enumerate(rows_NP)}
        losses = dict.fromkeys(adapters, (8, [2.0, 1.0]))
        num_bytes = self._store.put_unit(unit.name, adapters, {}, losses, LAYOUT, "float32")
        return {"num_users": len(adapters), "num_bytes": num_bytes}


@dataclass
class Half:
    """What was measured of one half of the run.

    Attributes:
        plan_s: listing what is committed and planning the rest.
        start_s: from the beginning, Ray's start included, until the first unit is dispatched.
        first_commit_s: the same until the first commit is known.
        work_s: from the first dispatch to the last commit.
        samples: (seconds since the beginning, users committed, driver's bytes, Ray head's bytes).
    """

    num_users: int = 0
    plan_s: float = 0.0
    start_s: float = 0.0
    first_commit_s: float = 0.0
    work_s: float = 0.0
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)


def bench(num_users: int, num_actors: int | Literal["auto"], folder: Path, json_file: Path | None) -> dict[str, Any]:
    """Run both halves in `folder` (empty), check that every user is there once, and tell.

    Raises:
        FleetError: where actors do not fit.
    """
    fleet = FleetConfig(num_actors=num_actors)
    config = RunConfig(output_dir=str(folder), fleet=fleet)
    generator = np.random.default_rng(0)
    cost = generator.lognormal(MEAN_LOG_TOKENS, SPREAD_LOG_TOKENS, num_users).astype(np.int64) + 1
    halves = [_half(config, cost, stop_after=num_users // 2), _half(config, cost, stop_after=None)]
    users = AdapterStore(folder / "store").users()
    assert len(users) == num_users == len(set(users)), f"{len(users)} adapters for {num_users} users"
    num_units = len(Catalog(folder / "store" / "catalog").units())
    result = {
        "machine": machine(),
        "num_users": num_users,
        "num_units": num_units,
        "num_tokens_per_unit": fleet.num_tokens_per_unit,
        "users_per_s": sum(half.num_users for half in halves) / sum(half.work_s for half in halves),
        "halves": [asdict(half) for half in halves],
    }
    _tell(result, halves)
    write_result(json_file, result)
    return result


def _half(config: RunConfig, cost: np.ndarray, stop_after: int | None) -> Half:
    """Work until so many users are committed, or to the end, as `Run` does for the user stage."""
    half, begun_s = Half(), time.perf_counter()
    units = plan_units(cost, config.fleet.num_tokens_per_unit)
    done = Catalog(config.output_path / "store" / "catalog").units()
    pending = [unit for unit in units if unit.name not in done]
    half.plan_s = time.perf_counter() - begun_s
    metrics = MetricsFile(config.output_path / "metrics.jsonl")

    def on_done(unit: Unit, report: dict[str, Any]) -> None:
        half.first_commit_s = half.first_commit_s or time.perf_counter() - begun_s
        half.num_users += unit.num_users
        metrics.log("user", unit=unit.name, **report)

    with (
        ray_cluster() as cluster,
        _sampled(half, begun_s),
        ray_pool("proper_ds.bench.control_plane:NoTrainingJob", config, {}, "user", cluster) as pool,
    ):
        timed = _FirstDispatch(pool, begun_s)
        controller = Controller(pending, timed, FailurePolicy(config.fleet.max_retries), on_done)
        while controller.step():
            if stop_after is not None and half.num_users >= stop_after:
                break
        half.start_s = timed.dispatched_s
        half.work_s = time.perf_counter() - begun_s - half.start_s
    return half


class _FirstDispatch:
    """A pool that notes when it was given its first unit."""

    def __init__(self, pool: RayPool, begun_s: float) -> None:
        self._pool, self._begun_s = pool, begun_s
        self.dispatched_s = 0.0
        self.wait: Callable[[], Any] = pool.wait
        self.place_of = pool.place_of

    @property
    def workers(self) -> list[int]:
        """See Pool."""
        return self._pool.workers

    def submit(self, worker: int, unit: Unit) -> None:
        """See Pool."""
        self.dispatched_s = self.dispatched_s or time.perf_counter() - self._begun_s
        self._pool.submit(worker, unit)


@contextmanager
def _sampled(half: Half, begun_s: float) -> Iterator[None]:
    """Note the memory of this process, and of Ray's head where it runs on this machine, every second."""
    driver, over = psutil.Process(), threading.Event()
    heads = [child for child in driver.children(recursive=True) if child.name().startswith("gcs_server")]

    def sample() -> None:
        while not over.wait(SAMPLE_S):
            head = heads[0].memory_info().rss if heads else 0
            seconds = round(time.perf_counter() - begun_s, 2)
            half.samples.append((seconds, half.num_users, driver.memory_info().rss, head))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _tell(result: dict[str, Any], halves: list[Half]) -> None:
    rows = []
    for name, half in zip(("first half", "resumed"), halves, strict=True):
        for share in (0.25, 0.5, 0.75, 1.0):
            seconds, _, driver, head = half.samples[max(0, int(share * len(half.samples)) - 1)]
            label = name if share == 0.25 else ""
            rows.append([label, f"{seconds:.0f}", f"{driver / 1e6:.0f}", f"{head / 1e6:.0f}" if head else "elsewhere"])
    resumed = halves[1]
    notes = [
        f"{result['users_per_s']:,.0f} users/s: {result['num_users']:,} users in {result['num_units']:,} units,"
        f" {', '.join(f'{half.work_s:.1f} s' for half in halves)}; every user committed once",
        f"resume: {resumed.plan_s:.2f} s to list and plan, first unit dispatched after {resumed.start_s:.1f} s (Ray's"
        f" start included), first commit after {resumed.first_commit_s:.1f} s",
    ]
    tell("Control plane without training", ["", "s", "driver, MB", "Ray head, MB"], rows, notes, result)
