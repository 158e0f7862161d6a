"""What the fleet adds to training: more actors, more users, durable commits. `proper-ds bench scaling` calls it.

Real training of random models by real actors under the real controller, all variants in turn on the same actors.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from proper_ds.bench.harness import Measured, in_turn, machine, tell, write_result
from proper_ds.bench.workloads import PRESETS, Preset, random_llama, random_users, user_settings
from proper_ds.config import RunConfig
from proper_ds.fleet.cluster import ray_cluster
from proper_ds.fleet.config import FleetConfig
from proper_ds.fleet.controller import Controller, Event, Place
from proper_ds.fleet.plan import Unit
from proper_ds.fleet.policy import FailurePolicy
from proper_ds.fleet.pool import RayPool, ray_pool
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.lora import LoraLayout
from proper_ds.store.store import AdapterStore
from proper_ds.training.users import train_users

What = Literal["actors", "flat", "commits"]
SMALL = dataclasses.replace(PRESETS["small"], num_users=128, num_epochs=1)
TINY = dataclasses.replace(
    PRESETS["small"],
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    vocab_size=256,
    num_users=100,
    num_items=4,
    num_epochs=2,
    r=4,
)
"""For ten thousand users, whose training must be short: the fleet's own cost weighs the more."""
COMMITS = "with commits"
BATCH_SIZE = 4


class TrainingJob:
    """Trains the same random users in every unit, under other names; commits them where the unit's part says so."""

    def __init__(self, config: RunConfig, device: torch.device, shape: dict[str, Any]) -> None:
        preset = Preset(**shape)
        self._settings = user_settings(preset, BATCH_SIZE)
        lora = self._settings.lora
        targets = find_targets(random_llama(preset, torch.float32, device), lora.target_modules)
        self._layout = LoraLayout.of(targets, lora)
        lm = random_llama(preset, torch.float32, device)
        self._model = PersonalModel(lm, find_targets(lm, lora.target_modules))
        self._tasks = random_users(preset, [preset.num_items] * preset.num_users)
        self._folder = config.output_path / "store"

    def run(self, unit: Unit) -> dict[str, Any]:
        """See Job."""
        start_cpu_s = time.process_time()
        tasks = [dataclasses.replace(task, key=f"user-{unit.first + n:07d}") for n, task in enumerate(self._tasks)]
        results = train_users(self._model, self._layout, tasks, self._settings, seed=1)
        adapters = {result.key: result.row_P for result in results if result.row_P is not None}
        assert len(adapters) == len(tasks), "a random user could not be trained"
        if unit.part == COMMITS:
            losses = {result.key: (result.num_items, result.losses) for result in results}
            store = AdapterStore(self._folder)
            store.put_unit(unit.name, adapters, {}, losses, self._layout, "float32")
        return {"rss_bytes": psutil.Process().memory_info().rss, "cpu_s": time.process_time() - start_cpu_s}


@dataclass(frozen=True)
class Use:
    """What actors used for some units.

    Attributes:
        cpu_s: processor time of one user.
        rss_bytes: the largest memory of an actor at the end of a unit.
    """

    cpu_s: float
    rss_bytes: int


@dataclass
class Fleet:
    """Warm actors that work through units when told to."""

    pool: RayPool
    users_per_unit: int
    num_units_begun: int = 0

    def work(self, num_units: int, num_actors: int, part: str = "") -> Use:
        """Have so many units done by the first so many actors."""
        first = self.num_units_begun
        self.num_units_begun += num_units
        size, reports = self.users_per_unit, []
        units = [Unit(n * size, (n + 1) * size, 1, part, size) for n in range(first, first + num_units)]
        some = _SomeWorkers(self.pool, self.pool.workers[:num_actors])
        Controller(units, some, FailurePolicy(0), lambda unit, report: reports.append(report)).run()
        assert len(reports) == num_units
        cpu_s = sum(report["cpu_s"] for report in reports) / (num_units * size)
        return Use(cpu_s, max(report["rss_bytes"] for report in reports))


@dataclass
class _SomeWorkers:
    """A pool of which only some workers are used."""

    pool: RayPool
    workers: list[int]

    def place_of(self, worker: int) -> Place:
        """See Pool."""
        return self.pool.place_of(worker)

    def submit(self, worker: int, unit: Unit) -> None:
        """See Pool."""
        self.pool.submit(worker, unit)

    def wait(self) -> list[Event]:
        """See Pool."""
        return self.pool.wait()


@contextmanager
def _fleet(preset: Preset, num_actors: int | Literal["auto"]) -> Iterator[tuple[Fleet, int, str]]:
    """(a fleet whose actors have all trained a unit, their number, the cluster in words)."""
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder, ray_cluster() as cluster:
        config = RunConfig(output_dir=folder, fleet=FleetConfig(num_actors=num_actors))
        wanted = cluster.num_actors(config.fleet)
        options = {"shape": dataclasses.asdict(preset)}
        with ray_pool("proper_ds.bench.scaling:TrainingJob", config, options, "bench", cluster) as pool:
            while len(pool.workers) < wanted:
                pool.wait()
            fleet = Fleet(pool, preset.num_users)
            fleet.work(2 * wanted, wanted, COMMITS)
            yield fleet, wanted, str(cluster)


def _steps(most: int) -> list[int]:
    """1, 2, 4 and so on, up to `most`."""
    return sorted({*(1 << n for n in range(most.bit_length()) if 1 << n <= most), most})


@dataclass
class _Rates:
    """Users/s by variant, and what the actors used, by variant and repetition."""

    users_per_s: dict[str, Measured]
    uses: dict[str, list[Use]]

    @classmethod
    def measure(cls, works: Mapping[str, Callable[[], Use]], num_users: Mapping[str, int], num_repeats: int) -> _Rates:
        """Run the works in turn; each trains its `num_users`."""
        uses: dict[str, list[Use]] = {name: [] for name in works}
        seconds = in_turn(works, num_repeats, lambda name, _, __, use: uses[name].append(use))
        return cls({name: found.per(num_users[name]) for name, found in seconds.items()}, uses)

    def tell(self, what: What, title: str, preset: Preset, notes: list[str], json_file: Path | None) -> dict[str, Any]:
        """Print the table and write the JSON; the first variant is what the others are compared with."""
        reference = next(iter(self.users_per_s.values())).median
        variants, rows = {}, []
        for name, rate in self.users_per_s.items():
            cpu_s = statistics.median(use.cpu_s for use in self.uses[name])
            rss = [use.rss_bytes for use in self.uses[name]]
            variants[name] = {
                "users_per_s": rate.values,
                "median_users_per_s": rate.median,
                "ratio": rate.median / reference,
                "cpu_s_per_user": cpu_s,
                "actor_rss_bytes": rss,
            }
            numbers = [f"{rate.median:.1f}", f"{rate.spread:.0%}", f"{rate.median / reference:.3f}"]
            rows.append([name, *numbers, f"{cpu_s * 1e3:.2f}", f"{rss[0] / 1e6:.0f}, {rss[-1] / 1e6:.0f}"])
        about = machine()
        result = {"what": what, "machine": about, "workload": dataclasses.asdict(preset), "variants": variants}
        columns = [what, "users/s", "spread", "ratio", "CPU ms a user", "actor MB, first and last"]
        tell(title, columns, rows, notes, result)
        write_result(json_file, result)
        return result


def bench_actors(num_repeats: int, num_actors: int | Literal["auto"], json_file: Path | None) -> dict[str, Any]:
    """Users/s of 1, 2, 4, ... actors; each has the same number of units to do."""
    units_each = 4
    with _fleet(SMALL, num_actors) as (fleet, most, cluster):
        works = {str(n): partial(fleet.work, n * units_each, n) for n in _steps(most)}
        num_users = {name: int(name) * units_each * SMALL.num_users for name in works}
        rates = _Rates.measure(works, num_users, num_repeats)
    notes = [f"{cluster}; {units_each} units of {SMALL.num_users} users for each actor, one thread an actor"]
    return rates.tell("actors", "More actors", SMALL, notes, json_file)


def bench_flat(num_repeats: int, json_file: Path | None) -> dict[str, Any]:
    """Cost of a user, and memory, over a thousand and over ten thousand users, with commits; one actor."""
    num_users = {f"{n:,}": n for n in (1_000, 10_000)}
    with _fleet(TINY, 1) as (fleet, _, _cluster):
        works = {name: partial(fleet.work, n // TINY.num_users, 1, COMMITS) for name, n in num_users.items()}
        rates = _Rates.measure(works, num_users, num_repeats)
    notes = [f"units of {TINY.num_users} users of a very small model, so that all but training weighs the more"]
    return rates.tell("flat", "Ten times the users", TINY, notes, json_file)


def bench_commits(num_repeats: int, json_file: Path | None) -> dict[str, Any]:
    """Training with durable commits against training whose result is dropped; one actor."""
    num_units = 4
    with _fleet(SMALL, 1) as (fleet, _, _cluster):
        works = {part: partial(fleet.work, num_units, 1, part) for part in ("without commits", COMMITS)}
        rates = _Rates.measure(works, dict.fromkeys(works, num_units * SMALL.num_users), num_repeats)
    notes = [f"units of {SMALL.num_users} users; a commit syncs a pack and its catalog fragment to disk"]
    return rates.tell("commits", "Durable commits", SMALL, notes, json_file)
