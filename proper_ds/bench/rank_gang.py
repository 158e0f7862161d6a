"""Ranks over gloo on this machine, for benchmarks: their results, and the most memory each held in each phase.

Memory is private memory: what a process wrote itself, without files that it maps. Linux tells it; elsewhere it is all
resident memory.
"""

from __future__ import annotations

import os
import queue
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SAMPLE_S = 0.002
TIMEOUT_S = 1800

Mark = Callable[[str], None]
"""Tells that a phase begins."""


@dataclass
class RankResult:
    """What one rank returned.

    Attributes:
        peak_bytes: the most private memory in each phase, by its name; phases of a few milliseconds may be missed.
    """

    value: Any = None
    peak_bytes: dict[str, int] = field(default_factory=dict)


def run_ranks(function: Callable[..., Any], num_ranks: int, phases: Sequence[str], *args: Any) -> list[RankResult]:
    """`function(mark, *args)` in so many processes of a gloo group, one torch thread each; results by rank.

    Args:
        phases: the names that `mark` may be called with; the first one begins by itself.

    Raises:
        RuntimeError: with a rank's own traceback, where one failed; the others are stopped.
    """
    context = mp.get_context("spawn")
    answers = context.Queue()
    port = _free_port()
    running = [context.Value("i", 0) for _ in range(num_ranks)]
    given = (function, tuple(phases), args, answers)
    workers = [
        context.Process(target=_main, args=(rank, num_ranks, port, running[rank], *given)) for rank in range(num_ranks)
    ]
    for worker in workers:
        worker.start()
    results = [RankResult() for _ in range(num_ranks)]
    try:
        missing, deadline_s = set(range(num_ranks)), time.monotonic() + TIMEOUT_S
        while missing:
            for rank in missing:
                _sample(workers[rank].pid, phases[running[rank].value], results[rank].peak_bytes)
            try:
                rank, value, error = answers.get(timeout=SAMPLE_S)
            except queue.Empty:
                if time.monotonic() > deadline_s or any(workers[rank].exitcode for rank in missing):
                    raise RuntimeError("a rank of the benchmark died or hung") from None
                continue
            if error is not None:
                raise RuntimeError(f"rank {rank} of the benchmark failed:\n{error}")
            results[rank].value = value
            missing.discard(rank)
        for worker in workers:
            worker.join(timeout=30)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
    return results


def _sample(pid: int | None, phase: str, peaks: dict[str, int]) -> None:
    try:
        memory = psutil.Process(pid).memory_info()
    except psutil.Error:
        return
    peaks[phase] = max(peaks.get(phase, 0), memory.rss - getattr(memory, "shared", 0))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _main(
    rank: int,
    num_ranks: int,
    port: int,
    running: Any,
    function: Callable[..., Any],
    phases: tuple[str, ...],
    args: tuple[Any, ...],
    answers: Any,
) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(rank),
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, about what DeepSpeed calls

    def mark(phase: str) -> None:
        running.value = phases.index(phase)

    try:
        dist.init_process_group("gloo", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=TIMEOUT_S))
        answers.put((rank, function(mark, *args), None))
        dist.barrier()
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
