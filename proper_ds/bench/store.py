"""`proper-ds bench store`: the adapter store beside one PEFT directory per user, same adapters, same disk, same run.

The rivals: PEFT's own `save_pretrained`; directories written by hand, the same two files without its README; and those
without fsync, which a power cut may take. Rivals handle a sample of the users, where time per user is what counts.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from proper_ds.bench.harness import in_turn, machine, tell, write_result
from proper_ds.bench.store_catalog import open_million
from proper_ds.bench.store_sides import (
    USERS_PER_UNIT,
    Adapters,
    DirectorySide,
    StoreSide,
    read_seconds,
    seconds_of,
    some_of,
    sync_files,
)
from proper_ds.errors import UserError
from proper_ds.model.adapter_file import peft_config
from proper_ds.model.lora import LoraLayout, ModuleShape

NUM_LAYERS, RANK, LORA_ALPHA = 6, 4, 8.0
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NUM_PEFT, BATCH, NUM_BATCHES, NUM_READS, NUM_DISTINCT = 100, 256, 5, 300, 1000
STORE, BY_HAND, UNSYNCED, PEFT = "store", "directories", "unsynced", "save_pretrained"


def run(num_users: int, adapter_bytes: int, num_repeats: int, scratch: Path | None, json_path: Path | None) -> None:
    """Measure, print and write; everything written on the way is deleted."""
    random.seed(0)
    adapters = _adapters(adapter_bytes, min(num_users, NUM_DISTINCT))
    num_sampled = min(num_users, max(BATCH, num_users // 10))
    if scratch is not None and not scratch.is_dir():
        raise UserError(f"--scratch {scratch} is no folder; give one on the disk to measure, or leave it out")
    with tempfile.TemporaryDirectory(dir=scratch, prefix="bench-store-") as folder:
        store = StoreSide(Path(folder, "store"), adapters)
        directories = DirectorySide(Path(folder, "directories"), adapters, synced=True)
        result: dict[str, Any] = {"num_users": num_users, "adapter_bytes": 4 * adapters.layout.num_parameters}
        result |= _measure_writes(Path(folder), adapters, {STORE: num_users, BY_HAND: num_sampled}, num_repeats)
        result |= _measure_reads(store, directories, num_sampled, num_repeats)
        result |= _measure_upkeep(store, directories, num_users, num_sampled)
        shutil.rmtree(store.folder)
        result |= _measure_types(Path(folder), adapters)
        result |= open_million(Path(folder, "million"), adapters.layout)
    result["machine"] = machine()
    _tell(result, num_repeats)
    write_result(json_path, result)


def _adapters(adapter_bytes: int, num: int) -> Adapters:
    """Adapters on the attention of a small Llama, about so large in float32."""
    width = max(8, adapter_bytes // (4 * 2 * RANK * NUM_LAYERS * len(PROJECTIONS)) // 8 * 8)
    names = [f"model.layers.{n}.self_attn.{projection}" for n in range(NUM_LAYERS) for projection in PROJECTIONS]
    layout = LoraLayout(tuple(ModuleShape(name, width, width) for name in names), RANK, LORA_ALPHA)
    rows_NP = 0.02 * torch.randn(num, layout.num_parameters, generator=torch.Generator().manual_seed(0))
    return Adapters(layout, rows_NP, peft_config(layout, list(PROJECTIONS), 0.0, "base", None))


def _peft_model(layout: LoraLayout) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=layout.modules[0].in_features,
        intermediate_size=32,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    settings = LoraConfig(r=RANK, lora_alpha=int(LORA_ALPHA), target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), settings)
    held = sum(value.numel() for name, value in model.named_parameters() if "lora_" in name)
    assert held == layout.num_parameters, "PEFT's adapter is as large as ours"
    return model


def _measure_writes(folder: Path, adapters: Adapters, num: dict[str, int], num_repeats: int) -> dict[str, Any]:
    """All sides write; the last of the store and of the synced directories stay for the reads."""
    num = num | {UNSYNCED: num[BY_HAND], PEFT: min(NUM_PEFT, num[STORE])}
    model = _peft_model(adapters.layout)

    def save_pretrained() -> None:
        # one adapter's values again and again: setting others is not what is measured
        for number in range(num[PEFT]):
            model.save_pretrained(folder / PEFT / f"user-{number}")
            sync_files(folder / PEFT / f"user-{number}")

    def tidy(name: str, number: int, *_: Any) -> None:
        if number < num_repeats - 1 or name in (UNSYNCED, PEFT):
            shutil.rmtree(folder / name)
        os.sync()  # what is not synced by itself must not burden the next

    variants = {
        STORE: lambda: StoreSide(folder / STORE, adapters).write(num[STORE]),
        BY_HAND: lambda: DirectorySide(folder / BY_HAND, adapters, synced=True).write(num[BY_HAND]),
        UNSYNCED: lambda: DirectorySide(folder / UNSYNCED, adapters, synced=False).write(num[UNSYNCED]),
        PEFT: save_pretrained,
    }
    StoreSide(folder / "warm-up", adapters).write(10)
    rates = {name: found.per(num[name]) for name, found in in_turn(variants, num_repeats, tidy).items()}
    return {
        "num_written": num,
        "write_per_s": {name: rate.median for name, rate in rates.items()},
        "write_spread": {name: rate.spread for name, rate in rates.items()},
        "write_ratio": {name: rates[STORE].median / rate.median for name, rate in rates.items() if name != STORE},
    }


def _measure_reads(store: StoreSide, directories: DirectorySide, num_users: int, num_repeats: int) -> dict[str, Any]:
    """Single reads, cold and warm, and batches, of users who are on both sides."""
    sides: dict[str, StoreSide | DirectorySide] = {STORE: store, BY_HAND: directories}
    seconds: dict[tuple[str, str], list[float]] = {(name, kind): [] for name in sides for kind in ("cold", "warm")}
    store.read(0)  # the catalog is read, as in any process that has begun to serve
    for _ in range(num_repeats):
        for (name, kind), found in seconds.items():
            found += read_seconds(sides[name], some_of(num_users, NUM_READS), cold=kind == "cold")
    for side in sides.values():
        _batch_s(side, num_users)  # the first is not counted, it warms
    batches: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(num_repeats * NUM_BATCHES):
        for name, side in sides.items():
            batches[name].append(_batch_s(side, num_users))
    batch_s = {name: statistics.median(found) for name, found in batches.items()}

    def quantile(kind: str, share: float) -> dict[str, float]:
        return {name: sorted(seconds[name, kind])[int(share * len(seconds[name, kind]))] for name in sides}

    return {
        "cold_read_s": quantile("cold", 0.5),
        "cold_read_p99_s": quantile("cold", 0.99),
        "warm_read_s": quantile("warm", 0.5),
        "warm_read_p99_s": quantile("warm", 0.99),
        "batch_256_s": batch_s,
        "batch_256_ratio": batch_s[BY_HAND] / batch_s[STORE],
    }


def _batch_s(side: StoreSide | DirectorySide, num_users: int) -> float:
    numbers = some_of(num_users, BATCH)
    return seconds_of(lambda: side.read_batch(numbers))


def _measure_upkeep(side: StoreSide, directories: DirectorySide, num_users: int, num_gone: int) -> dict[str, Any]:
    """Compacting, then forgetting; once each, for both change what they work on."""
    store = side.store
    before = store.stats()
    compact_s = seconds_of(store.compact)
    after = store.stats()
    gone = [f"user-{number}" for number in some_of(num_users, num_gone)]
    forget_s = seconds_of(lambda: store.forget(gone))
    assert store.stats().num_users == num_users - len(gone)
    return {
        "compact_s": compact_s,
        "compact_bytes_per_s": before.pack_bytes / compact_s,
        "num_forgotten": len(gone),
        "forget_s": {STORE: forget_s, BY_HAND: seconds_of(lambda: shutil.rmtree(directories.folder))},
        "files_per_1000_users": {
            "as put": before.files_per_1000_users,
            "compacted": after.files_per_1000_users,
            BY_HAND: 2000.0,
        },
        "index_bytes_per_user": {"as put": before.index_bytes_per_user, "compacted": after.index_bytes_per_user},
    }


def _measure_types(folder: Path, adapters: Adapters) -> dict[str, Any]:
    """Bytes and errors of the stored types, on as many users as differ."""
    num = len(adapters.rows_NP)
    stored, largest, relative = {}, {}, {}
    for dtype in ("float32", "bfloat16", "int8"):
        side = StoreSide(folder / dtype, adapters)
        side.write(num, dtype)
        stored[dtype] = side.store.stats().pack_bytes / num
        error_NP = side.read_batch(list(range(num))) - adapters.rows_NP
        largest[dtype] = float(error_NP.abs().max() / adapters.rows_NP.abs().max())
        relative[dtype] = float(error_NP.norm() / adapters.rows_NP.norm())
        shutil.rmtree(side.folder)
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
