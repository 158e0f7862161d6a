"""What a rank needs to know which examples it sees: memory and seconds to a step, few examples against many.

Beside it, transformers' `group_by_length` on the same files. `proper-ds bench data --what order` calls it.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from proper_ds.bench.harness import machine, tell, write_result
from proper_ds.data.batches import StepPlan
from proper_ds.data.tokens import EXAMPLES_PER_FILE, HISTORY, MARKER, QUERY, ROWS_PER_BATCH, SCHEMA, TokenData
from proper_ds.training.selection import training_examples, training_users

EXAMPLES_PER_USER = 20
TRAIN_BATCH_SIZE = 64
FEWER = 10
"""The smaller set has so many times fewer examples."""
_SAMPLED_S = 0.002


def write_examples(folder: Path, num_examples: int) -> None:
    """A folder as `tokenize` leaves it: made-up examples of 4 to 40 tokens, each user's last one a question."""
    folder.mkdir(parents=True)
    files = list[str]()
    for start in range(0, num_examples, EXAMPLES_PER_FILE):
        stop = min(start + EXAMPLES_PER_FILE, num_examples)
        files.append(f"examples-{len(files):05d}.arrow")
        with pa.OSFile(str(folder / files[-1]), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as stream:
            for first in range(start, stop, ROWS_PER_BATCH):
                stream.write_batch(_made_up(np.arange(first, min(first + ROWS_PER_BATCH, stop))))
    first_of_user = np.minimum(np.arange(0, num_examples + EXAMPLES_PER_USER, EXAMPLES_PER_USER), num_examples)
    np.save(folder / "first.npy", first_of_user, allow_pickle=False)
    about = {"files": files, "tasks": ["made_up"], "splits": ["train"], "labels": {}, "num_examples": num_examples}
    (folder / MARKER).write_text(json.dumps(about), encoding="utf-8")


def _made_up(index: np.ndarray) -> pa.RecordBatch:
    position = index % EXAMPLES_PER_USER
    is_query, length = position == EXAMPLES_PER_USER - 1, 4 + index * 7919 % 37
    columns = {
        "user": index // EXAMPLES_PER_USER,
        "kind": np.where(is_query, QUERY, HISTORY),
        "split": np.where(is_query, 0, -1),
        "task": np.zeros_like(index),
        "position": position,
        "has_answer": np.ones(len(index), dtype=bool),
        "num_prompt": length - 2,
        "num_tokens": length,
    }
    arrays = [pa.array(values, type=SCHEMA.field(name).type) for name, values in columns.items()]
    offsets = np.concatenate([[0], np.cumsum(length)])
    ids = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(np.zeros(offsets[-1]), pa.int32()))
    return pa.RecordBatch.from_arrays([*arrays, ids], schema=SCHEMA)


def our_step(folder: Path) -> int:
    """A rank's part of the step in the middle of the first epoch: its number of examples."""
    tokens = TokenData(folder)
    chosen = training_examples(tokens, ["history", "queries"], training_users(tokens, "train"), "train", "population")
    plan = StepPlan(
        chosen,
        num_ranks=4,
        per_device=TRAIN_BATCH_SIZE // 4,
        train_batch_size=TRAIN_BATCH_SIZE,
        num_epochs=1,
        max_steps=None,
        seed=1,
    )
    step = next(plan.steps(plan.num_steps // 2))
    return len(tokens.examples(step.micro[0][0]))


def trainers_step(folder: Path) -> int:
    """The first batch as `transformers.Trainer` has it under `group_by_length`: its number of examples."""
    import torch
    from datasets import Dataset, concatenate_datasets
    from transformers.trainer_pt_utils import LengthGroupedSampler

    files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
    data = concatenate_datasets([Dataset.from_file(str(folder / name)) for name in files])
    generator = torch.Generator().manual_seed(1)
    sampler = LengthGroupedSampler(TRAIN_BATCH_SIZE, lengths=data["num_tokens"][:], generator=generator)
    return len(data[list(islice(iter(sampler), TRAIN_BATCH_SIZE))]["input_ids"])


WAYS: dict[str, Callable[[Path], int]] = {"ours": our_step, "group_by_length": trainers_step}


def _own_bytes() -> int:
    """Memory of this process without mapped files, which the system may drop at any time."""
    about = psutil.Process().memory_info()
    return int(about.rss - getattr(about, "shared", 0))


def measure(way: str, warm_folder: Path, folder: Path) -> dict[str, float]:
    """In a process of its own: {"bytes": most memory above what libraries take, "seconds": to the step}."""
    WAYS[way](warm_folder)  # imports
    before, most, done = _own_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(_SAMPLED_S):
            most = max(most, _own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start_s = time.perf_counter()
    WAYS[way](folder)
    seconds = time.perf_counter() - start_s
    done.set()
    watcher.join()
    return {"bytes": max(0, max(most, _own_bytes()) - before), "seconds": seconds}


def bench_order(num_examples: int, json_path: Path | None) -> None:
    """Measure, print, and write the figures."""
    found: dict[str, dict[str, dict[str, float]]] = {way: {} for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="order-") as scratch:
        folders = {count: Path(scratch) / str(count) for count in (1_000, num_examples // FEWER, num_examples)}
        for count, folder in folders.items():
            write_examples(folder, count)
        warm, *measured = folders
        for way in WAYS:
            for count in measured:
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    found[way][str(count)] = pool.submit(measure, way, folders[warm], folders[count]).result()
    rows = [
        [way, f"{int(count):,}", f"{about['bytes'] / 1e6:.0f} MB", f"{about['seconds']:.2f} s"]
        for way, by_count in found.items()
        for count, about in by_count.items()
    ]
    result: dict[str, Any] = {"order": found, "machine": machine()}
    notes = ["`ours` goes to the step in the middle of an epoch, `group_by_length` (transformers.Trainer) to the first"]
    columns = ["way", "examples", "memory of a rank", "to a step's examples"]
    tell("The order of examples", columns, rows, notes, result)
    write_result(json_path, result)
