"""How benchmarks measure and tell: variants in turn, several times, median and spread, a table and a JSON file.

Every benchmark of `proper-ds bench` uses it; nothing here knows what is measured.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from proper_ds.files import write_json_atomic

_FILE_WIDTH = 140


@dataclass(frozen=True)
class Measured:
    """Repeated measurements of one variant.

    Attributes:
        values: one number a repetition, in order; seconds unless the caller says otherwise.
    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Middle value."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """(largest - smallest) / median."""
        return (max(self.values) - min(self.values)) / self.median if self.median else 0.0

    def per(self, num: float) -> Measured:
        """`num / seconds` of each repetition: a rate."""
        return Measured(tuple(num / value for value in self.values))


def in_turn(
    variants: Mapping[str, Callable[[], Any]],
    num_repeats: int,
    on_done: Callable[[str, int, float, Any], None] = lambda name, number, seconds, result: None,
) -> dict[str, Measured]:
    """Seconds of every variant: all of them once, then all again, so that a slow minute hits all alike.

    Args:
        variants: by name, what to time.
        num_repeats: how often each runs.
        on_done: called with (name, repetition, seconds, the variant's result).
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(num_repeats):
        for name, variant in variants.items():
            gc.collect()
            _finish_device()
            start_s = time.perf_counter()
            result = variant()
            _finish_device()
            seconds[name].append(time.perf_counter() - start_s)
            on_done(name, number, seconds[name][-1], result)
    return {name: Measured(tuple(values)) for name, values in seconds.items()}


def _finish_device() -> None:
    """Wait for a GPU's queue, whose work would else be billed to whoever comes next."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    """Where and when: for the JSON and the line under the table."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def tell(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str], result: dict[str, Any]
) -> None:
    """Print a table and its notes; `result["machine"]` names the machine."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console = Console(soft_wrap=True, width=_FILE_WIDTH)  # else 80, whatever the table needs
    console.print(table)
    about = result["machine"]
    where = about["gpu"] or f"{about['num_cpus']} CPUs ({about['cpu']}), {about['num_threads']} torch threads"
    for note in [*notes, f"{where}, torch {about['torch']}, {about['date']}"]:
        console.print(note, highlight=False)


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Write what was printed as JSON, where a path is given."""
    if path is not None:
        write_json_atomic(path, result)
