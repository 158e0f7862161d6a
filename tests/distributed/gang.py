"""Starts real ranks over gloo for a test, and brings their results or their first error back."""

from __future__ import annotations

import os
import pickle
import socket
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 300


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _main(rank: int, num_ranks: int, port: int, function: Callable, args: tuple, queue: Any) -> None:
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
    try:
        dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
        result = function(*args)
        queue.put((rank, pickle.dumps(result), None))  # as bytes: shared memory would die with this process
        dist.barrier()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(function: Callable, num_ranks: int, *args: Any) -> list[Any]:
    """`function(*args)` on so many ranks; results by rank. Everything is gone afterwards, also on failure."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    port = _free_port()
    workers = [
        context.Process(target=_main, args=(rank, num_ranks, port, function, args, queue)) for rank in range(num_ranks)
    ]
    for worker in workers:
        worker.start()
    results: dict[int, Any] = {}
    try:
        for _ in workers:
            rank, result, error = queue.get(timeout=TIMEOUT_S)
            if error is not None:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            results[rank] = pickle.loads(result)
    finally:
        for worker in workers:
            worker.join(timeout=30)
            if worker.is_alive():
                worker.kill()
    return [results[rank] for rank in range(num_ranks)]
