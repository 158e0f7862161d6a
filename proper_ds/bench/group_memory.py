"""Memory of each rank while a base is loaded and trained on: whole on every rank, or straight into its ZeRO-3 shards.

`proper-ds bench group --memory` runs it on random Llamas that it writes into files; figures are in docs/benchmarks.md.
"""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from proper_ds.bench.harness import machine, tell, write_result
from proper_ds.bench.rank_gang import Mark, RankResult, run_ranks
from proper_ds.bench.workloads import PRESETS, Preset, random_llama
from proper_ds.config import validate
from proper_ds.data.batches import collate
from proper_ds.data.tokens import HISTORY, Example
from proper_ds.distributed.ds_config import resolve_ds
from proper_ds.distributed.engine import RankEngine
from proper_ds.distributed.ranks import current_ranks
from proper_ds.distributed.sharded_base import holding
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.checkpointing import checkpoint_layers
from proper_ds.model.lora import LoraLayout
from proper_ds.training.config import PopulationConfig
from proper_ds.training.context import RunContext
from proper_ds.training.population import PopulationModule
from proper_ds.training.rank_batch import RankBatch

PHASES = ("start", "load", "train", "end")
NUM_STEPS = 2
# DeepSpeed keeps up to 1e9 gathered numbers alive, which is all of a small base: here as few as it can.
ZERO_3 = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def write_bases(preset: Preset, folder: Path) -> int:
    """Write a base and a tiny one to warm up with; returns the bytes of the base's weights."""
    write_base(PRESETS["small"], folder / "tiny")
    return write_base(preset, folder / "base")


def write_base(preset: Preset, folder: Path) -> int:
    """Write a random Llama in several files; returns the bytes of its weights."""
    lm = random_llama(preset, torch.float32, torch.device("cpu"))
    num_bytes = sum(parameter.nbytes for parameter in lm.parameters())
    lm.save_pretrained(folder, max_shard_size=max(1 << 20, num_bytes // 6))
    return num_bytes


def load_and_train(mark: Mark, folder: str, sharded: bool, checkpointed: bool) -> list[float]:
    """On a rank: cross-entropy of each step on `folder/base`, after all was done once with `folder/tiny`."""
    _train(lambda phase: None, folder, "tiny", sharded, checkpointed)
    gc.collect()
    dist.barrier()
    mark("load")
    losses = _train(mark, folder, "base", sharded, checkpointed)
    mark("end")
    return losses


def _train(mark: Mark, folder: str, base: str, sharded: bool, checkpointed: bool) -> list[float]:
    raw = {"output_dir": f"{folder}/run", "base": {"model": f"{folder}/{base}", "dtype": "float32"}}
    context = RunContext(validate(raw | {"data": {"path": folder}}, "benchmark"), torch.device("cpu"))
    settings, ranks = PopulationConfig(per_device_train_batch_size=2), current_ranks(1)
    ds_config, problems = resolve_ds({"zero_optimization": ZERO_3}, "population", settings, ranks.num_ranks, False)
    assert not problems, problems
    lm = context.load_lm(with_population=False, zero3=ds_config if sharded else None)
    if checkpointed:
        checkpoint_layers(lm, holding)
    targets = find_targets(lm, settings.lora.target_modules)
    module = PopulationModule(PersonalModel(lm, targets), LoraLayout.of(targets, settings.lora), 0.0, seed=0)
    engine = RankEngine(module, ds_config, ranks)
    dist.barrier()
    mark("train")
    losses = []
    for step in range(NUM_STEPS):
        generator, num = np.random.default_rng([step, ranks.rank]), ranks.num_ranks
        ids = generator.integers(3, lm.config.vocab_size, (2, 48))
        examples = [Example(0, HISTORY, 0, position, 40, row.astype(np.int64)) for position, row in enumerate(ids)]
        batch = RankBatch(collate(examples, ranks.device), 1.0, 16 * num, 2 * num, num)
        losses.append(ranks.sum([engine.step([batch], 1e-3)["ce"]])[0])
    engine.close()
    return losses


def measure(folder: Path, num_ranks: int, sharded: bool, checkpointed: bool) -> dict[str, Any]:
    """Peak bytes above those at the start, of the rank that has most, while loading and in training; and losses."""
    ranks: list[RankResult] = run_ranks(load_and_train, num_ranks, PHASES, str(folder), sharded, checkpointed)
    above = [
        {phase: rank.peak_bytes[phase] - rank.peak_bytes["start"] for phase in ("load", "train")} for rank in ranks
    ]
    return {phase: max(rank[phase] for rank in above) for phase in ("load", "train")} | {"losses": ranks[0].value}


def bench_memory(preset_name: str, json_path: Path | None) -> dict[str, Any]:
    """Run it for 1, 2 and 4 ranks, print the table and return what `--json` writes."""
    preset, variants = PRESETS[preset_name], {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        num_bytes = write_bases(preset, folder)
        for num_ranks in (1, 2, 4):
            for name, sharded, checkpointed in (
                ("whole", False, False),
                ("shards", True, False),
                ("shards, gradient checkpointing", True, True),
            ):
                found = measure(folder, num_ranks, sharded, checkpointed)
                variants[f"{num_ranks} ranks, {name}"] = found | {"share_bytes": num_bytes // num_ranks}
    result = {"preset": preset_name, "base_bytes": num_bytes, "variants": variants, "machine": machine()}
    rows = [
        [name, *(f"{found[key] / 1e6:,.0f}" for key in ("share_bytes", "load", "train"))]
        for name, found in variants.items()
    ]
    columns = ["base", "its share (MB)", "peak while loading (MB)", "peak in training (MB)"]
    notes = [
        "private memory of the rank that has most, above that of a process that has done the same with a tiny base"
    ]
    tell(
        f"bench group --memory, {preset_name}: fp32 base of {num_bytes / 1e6:,.0f} MB, ZeRO 3",
        columns,
        rows,
        notes,
        result,
    )
    write_result(json_path, result)
    return result
