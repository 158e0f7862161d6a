"""`proper-ds bench store`: the adapter store beside one PEFT directory per user, same adapters, same disk, same run.

The rivals: PEFT's own `save_pretrained`; directories written by hand, the same two files without its README; and those
without fsync, which a power cut may take. Rivals handle a sample of the users, where time per user is what counts.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from proper_ds.bench.harness import in_turn, machine, tell, write_result
from proper_ds.bench.store_catalog import open_million
from proper_ds.files import sync_folder
from proper_ds.model.adapter_file import CONFIG, WEIGHTS, peft_config
from proper_ds.model.lora import LoraLayout, ModuleShape
from proper_ds.store.store import AdapterStore

Tensor = torch.Tensor

NUM_LAYERS, RANK, LORA_ALPHA = 6, 4, 8.0
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
USERS_PER_UNIT, NUM_PEFT, BATCH, NUM_READS = 1000, 100, 256, 300
NUM_DISTINCT = 1000  # adapters that differ; users beyond them get the same ones again
STORE, BY_HAND, UNSYNCED, PEFT = "store", "directories", "unsynced", "save_pretrained"


@dataclass
class Bench:
    """What is measured, and on what. Shapes: N distinct adapters, P numbers each."""

    folder: Path
    num_users: int
    num_sampled: int
    layout: LoraLayout
    rows_NP: Tensor
    about: dict[str, Any]
    reads: dict[str, list[float]] = field(default_factory=dict)

    def row_of(self, number: int) -> Tensor:
        """A user's adapter [P]."""
        return self.rows_NP[number % len(self.rows_NP)]

    def sample(self, num: int) -> list[int]:
        """Some of the users that have a directory too."""
        return random.sample(range(self.num_sampled), num)

    def put_all(self, dtype: str, num_users: int, folder: Path) -> AdapterStore:
        """A store of the first users, in units."""
        store = AdapterStore(folder)
        for first in range(0, num_users, USERS_PER_UNIT):
            numbers = range(first, min(num_users, first + USERS_PER_UNIT))
            adapters = {f"user-{number}": self.row_of(number) for number in numbers}
            losses = dict.fromkeys(adapters, (20, [2.0, 1.0]))
            store.put_unit(f"unit-{first:010d}", adapters, {}, losses, self.layout, dtype)
        return store

    def write_directory(self, folder: Path, number: int, synced: bool) -> None:
        """One PEFT directory by hand."""
        target = folder / f"user-{number}"
        target.mkdir(parents=True)
        tensors = {}
        for name, a_SrD, b_SEr in self.layout.views(self.row_of(number).unsqueeze(0)):
            tensors[f"base_model.model.{name}.lora_A.weight"] = a_SrD[0]
            tensors[f"base_model.model.{name}.lora_B.weight"] = b_SEr[0]
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
        (target / CONFIG).write_text(json.dumps(self.about))
        if synced:
            sync_files(target)


def sync_files(folder: Path) -> None:
    """Make a folder and the files in it durable."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
    sync_folder(folder.parent)


def run(num_users: int, adapter_bytes: int, num_repeats: int, scratch: Path | None, json_path: Path | None) -> None:
    """Measure, print and write; everything written on the way is deleted."""
    random.seed(0)
    width = max(8, adapter_bytes // (4 * 2 * RANK * NUM_LAYERS * len(PROJECTIONS)) // 8 * 8)
    names = [f"model.layers.{n}.self_attn.{projection}" for n in range(NUM_LAYERS) for projection in PROJECTIONS]
    layout = LoraLayout(tuple(ModuleShape(name, width, width) for name in names), RANK, LORA_ALPHA)
    rows_NP = torch.randn(
        min(num_users, NUM_DISTINCT), layout.num_parameters, generator=torch.Generator().manual_seed(0)
    )
    about = peft_config(layout, list(PROJECTIONS), 0.0, "base", None)
    num_sampled = min(num_users, max(BATCH, num_users // 10))
    with tempfile.TemporaryDirectory(dir=scratch, prefix="bench-store-") as folder:
        bench = Bench(Path(folder), num_users, num_sampled, layout, rows_NP * 0.02, about)
        result: dict[str, Any] = {"num_users": num_users, "adapter_bytes": 4 * layout.num_parameters}
        result |= _measure_writes(bench, num_repeats)
        store = AdapterStore(bench.folder / "store")
        result |= _measure_reads(bench, store, num_repeats)
        result |= _measure_upkeep(bench, store)
        result |= _measure_types(bench)
        shutil.rmtree(bench.folder / "store")
        result |= open_million(bench.folder / "million", layout)
    result["machine"] = machine()
    _tell(result, num_repeats)
    write_result(json_path, result)


def _peft_model(bench: Bench) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    width = bench.layout.modules[0].in_features
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    settings = LoraConfig(r=RANK, lora_alpha=int(LORA_ALPHA), target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), settings)
    held = sum(value.numel() for name, value in model.named_parameters() if "lora_" in name)
    assert held == bench.layout.num_parameters, "PEFT's adapter is as large as ours"
    return model


def _measure_writes(bench: Bench, num_repeats: int) -> dict[str, Any]:
    model = _peft_model(bench)
    num_peft = min(NUM_PEFT, bench.num_users)

    def directories(name: str, synced: bool) -> Callable[[], None]:
        def write() -> None:
            for number in range(bench.num_sampled):
                bench.write_directory(bench.folder / name, number, synced)

        return write

    def save_pretrained() -> None:
        # one adapter's values again and again: setting others is not what is measured
        for number in range(num_peft):
            model.save_pretrained(bench.folder / "peft" / f"user-{number}")
            sync_files(bench.folder / "peft" / f"user-{number}")

    folders = {STORE: "store", BY_HAND: "by_hand", UNSYNCED: "unsynced", PEFT: "peft"}
    num = {STORE: bench.num_users, BY_HAND: bench.num_sampled, UNSYNCED: bench.num_sampled, PEFT: num_peft}
    done = dict.fromkeys(folders, 0)

    def tidy(name: str, *_: Any) -> None:
        done[name] += 1
        # the last of each stays for the reads; what is not synced by itself must not burden the next
        if done[name] < num_repeats or name in (UNSYNCED, PEFT):
            shutil.rmtree(bench.folder / folders[name])
        os.sync()

    variants: dict[str, Callable[[], Any]] = {
        STORE: lambda: bench.put_all("float32", bench.num_users, bench.folder / "store"),
        BY_HAND: directories("by_hand", True),
        UNSYNCED: directories("unsynced", False),
        PEFT: save_pretrained,
    }
    bench.put_all("float32", 10, bench.folder / "warm-up")
    rates = {name: found.per(num[name]) for name, found in in_turn(variants, num_repeats, tidy).items()}
    return {
        "num_written": num,
        "write_per_s": {name: rate.median for name, rate in rates.items()},
        "write_spread": {name: rate.spread for name, rate in rates.items()},
        "write_ratio": {name: rates[STORE].median / rate.median for name, rate in rates.items() if name != STORE},
    }


def _drop_from_cache(paths: Sequence[Path]) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _measure_reads(bench: Bench, store: AdapterStore, num_repeats: int) -> dict[str, Any]:
    by_hand = bench.folder / "by_hand"
    packs = sorted((bench.folder / "store" / "packs").iterdir())

    def from_store(number: int) -> None:
        store.get(f"user-{number}")

    def from_directory(number: int) -> dict[str, Tensor]:
        folder = by_hand / f"user-{number}"
        json.loads((folder / CONFIG).read_text())
        return load_file(folder / WEIGHTS)

    def each(read: Callable[[int], Any], cold: bool, paths: Callable[[int], Sequence[Path]]) -> list[float]:
        numbers, seconds = bench.sample(min(NUM_READS, bench.num_sampled)), []
        for number in numbers:
            if cold:
                _drop_from_cache(paths(number))
            else:
                read(number)
            start_s = time.perf_counter()
            read(number)
            seconds.append(time.perf_counter() - start_s)
        return seconds

    def batch_from_store() -> Tensor:
        return store.get_many([f"user-{number}" for number in bench.sample(BATCH)])

    def batch_from_directories() -> list[Tensor]:
        found = [from_directory(number) for number in bench.sample(BATCH)]
        return [torch.stack([tensors[name] for tensors in found]) for name in found[0]]

    def keep(name: str, number: int, seconds: float, result: Any) -> None:
        if result is not None:
            bench.reads.setdefault(name, []).extend(result)

    files = {STORE: lambda number: packs, BY_HAND: lambda number: list((by_hand / f"user-{number}").iterdir())}
    reads = {STORE: from_store, BY_HAND: from_directory}
    os.sync()
    store.get("user-0")  # the catalog is read, as in any process that has begun to serve
    variants = {
        f"{name}/{cold}": partial(each, read, cold, files[name])
        for cold in (True, False)
        for name, read in reads.items()
    }
    in_turn(variants, num_repeats, keep)
    batch_from_store()
    batch_from_directories()  # both warm
    batches = in_turn({STORE: batch_from_store, BY_HAND: batch_from_directories}, num_repeats)

    def middle(cold: bool, nth: float) -> dict[str, float]:
        return {
            name: sorted(bench.reads[f"{name}/{cold}"])[int(nth * len(bench.reads[f"{name}/{cold}"]))] for name in reads
        }

    return {
        "cold_read_s": middle(True, 0.5),
        "cold_read_p99_s": middle(True, 0.99),
        "warm_read_s": middle(False, 0.5),
        "warm_read_p99_s": middle(False, 0.99),
        "batch_256_s": {name: found.median for name, found in batches.items()},
        "batch_256_ratio": batches[BY_HAND].median / batches[STORE].median,
    }


def _seconds(what: Callable[[], Any]) -> float:
    start_s = time.perf_counter()
    what()
    return time.perf_counter() - start_s


def _measure_upkeep(bench: Bench, store: AdapterStore) -> dict[str, Any]:
    """Compacting, then forgetting; once each, for both change what they work on."""
    before = store.stats()
    compact_s = _seconds(store.compact)
    after = store.stats()
    gone = [f"user-{number}" for number in random.sample(range(bench.num_users), bench.num_sampled)]
    forget_s = _seconds(lambda: store.forget(gone))
    assert store.stats().num_users == bench.num_users - len(gone)
    directories_s = _seconds(lambda: shutil.rmtree(bench.folder / "by_hand"))
    return {
        "compact_s": compact_s,
        "compact_bytes_per_s": before.pack_bytes / compact_s,
        "num_forgotten": len(gone),
        "forget_s": {STORE: forget_s, BY_HAND: directories_s},
        "files_per_1000_users": {
            "as put": before.files_per_1000_users,
            "compacted": after.files_per_1000_users,
            BY_HAND: 2000.0,
        },
        "index_bytes_per_user": {"as put": before.index_bytes_per_user, "compacted": after.index_bytes_per_user},
    }


def _measure_types(bench: Bench) -> dict[str, Any]:
    """Bytes and errors of the stored types, on as many users as differ."""
    num = len(bench.rows_NP)
    stored: dict[str, float] = {}
    largest, relative = {}, {}
    for dtype in ("float32", "bfloat16", "int8"):
        folder = bench.folder / dtype
        store = bench.put_all(dtype, num, folder)
        stored[dtype] = store.stats().pack_bytes / num
        error_NP = store.get_many([f"user-{number}" for number in range(num)]) - bench.rows_NP
        largest[dtype] = float(error_NP.abs().max() / bench.rows_NP.abs().max())
        relative[dtype] = float(error_NP.norm() / bench.rows_NP.norm())
        shutil.rmtree(folder)
    return {"bytes_per_user": stored, "max_error": largest, "relative_error": relative}


def _tell(result: dict[str, Any], num_repeats: int) -> None:
    write, ratio = result["write_per_s"], result["write_ratio"]

    def ms(values: dict[str, float], name: str) -> str:
        return f"{1000 * values[name]:,.2f} ms" if name in values else ""

    rows = [
        [
            name,
            f"{write[name]:,.0f}",
            f"{ratio[name]:,.1f}x" if name in ratio else "",
            ms(result["cold_read_s"], name),
            ms(result["warm_read_s"], name),
            ms(result["batch_256_s"], name),
            f"{result['forget_s'][name]:,.2f} s" if name in result["forget_s"] else "",
        ]
        for name in (STORE, BY_HAND, UNSYNCED, PEFT)
    ]
    columns = ["", "write/s", "store is", "read, cold", "read, warm", f"{BATCH} users", "forget"]
    num, files, index = result["num_written"], result["files_per_1000_users"], result["index_bytes_per_user"]
    notes = [
        f"{result['num_users']:,} adapters of {result['adapter_bytes']:,} bytes, {USERS_PER_UNIT:,} a unit; directories"
        f" {num[BY_HAND]:,}, save_pretrained {num[PEFT]:,}; median of {num_repeats}; synced unless it says so",
        f"batch of {BATCH}: {result['batch_256_ratio']:.1f}x faster than from directories",
        f"forget: {result['num_forgotten']:,} random users at once, every pack written anew; compact:"
        f" {result['compact_s']:.2f} s, {result['compact_bytes_per_s'] / 1e6:,.0f} MB/s",
        f"files per 1,000 users: {files['as put']:.2f} as put, {files['compacted']:.2f} compacted,"
        f" {files[BY_HAND]:,.0f} in directories; catalog: {index['as put']:.0f} and {index['compacted']:.0f} bytes",
        "stored bytes and error: "
        + "; ".join(
            f"{dtype} {size:,.0f}, {result['relative_error'][dtype]:.2%} (largest {result['max_error'][dtype]:.2%})"
            for dtype, size in result["bytes_per_user"].items()
        ),
        f"a million users: {result['index_bytes_per_user_million']:.0f} bytes a user on disk, open in"
        f" {result['open_million_s']:.2f} s with {result['open_million_memory_bytes'] / 1e6:,.0f} MB, look-up"
        f" {1e6 * result['lookup_million_s']:.0f} microseconds",
    ]
    tell("Adapter store", columns, rows, notes, result)
