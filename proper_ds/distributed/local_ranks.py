"""Starts ranks on this machine without Ray, runs a function on each, and brings back what they return as JSON.

For benchmarks, which need ranks of which nothing else is asked; runs of the pipeline go through `fleet/gang.py`.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from proper_ds.errors import FleetError
from proper_ds.files import write_json_atomic


def run_local_ranks(entry: str, num_ranks: int, payload: dict[str, Any], timeout_s: float) -> list[Any]:
    """`entry(payload)` on so many ranks (gloo; NCCL where there is a GPU for each); results by rank.

    Args:
        entry: `module:function`; its result must be JSON.

    Raises:
        FleetError: with the first rank's error, or when they take longer than `timeout_s`. All are gone then.
    """
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        ranks = [
            context.Process(target=_main, args=(rank, num_ranks, name, entry, payload)) for rank in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        end_s = time.monotonic() + timeout_s
        try:
            while any(process.is_alive() for process in ranks) and time.monotonic() < end_s:
                if any(process.exitcode for process in ranks):
                    break
                time.sleep(0.05)
        finally:
            lost = [f"rank {n} by signal {-p.exitcode}" for n, p in enumerate(ranks) if p.exitcode and p.exitcode < 0]
            for process in ranks:
                if process.is_alive():
                    process.join(timeout=2 if any(p.exitcode for p in ranks) else 0)
                    process.kill()
                process.join()
        errors = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.error"))[:1]]
        if lost:  # what the others say of it is only that somebody is gone
            errors.insert(0, f"ended, perhaps for memory: {', '.join(lost)}")
        if errors:
            raise FleetError(f"{entry} failed on {num_ranks} ranks:\n" + "\n".join(errors))
        results = [folder / f"{rank}.json" for rank in range(num_ranks)]
        if not all(path.exists() for path in results):
            raise FleetError(f"{entry} on {num_ranks} ranks did not end within {timeout_s:g} s")
        return [json.loads(path.read_text(encoding="utf-8")) for path in results]


def _main(rank: int, num_ranks: int, folder: str, entry: str, payload: dict[str, Any]) -> None:
    on_gpus = torch.cuda.device_count() >= num_ranks
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank)}
    # DeepSpeed asks for them even where the process group is there already
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, about what DeepSpeed calls
    try:
        if on_gpus:
            torch.cuda.set_device(rank)
        store = dist.FileStore(f"{folder}/rendezvous", num_ranks)
        dist.init_process_group("nccl" if on_gpus else "gloo", store=store, rank=rank, world_size=num_ranks)
        module, _, function = entry.partition(":")
        result = getattr(importlib.import_module(module), function)(payload)
        write_json_atomic(Path(folder) / f"{rank}.json", result)
        dist.barrier()
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc(), encoding="utf-8")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
