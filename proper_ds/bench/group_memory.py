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

from proper_ds.bench.harness import machine, tell, write_result
from proper_ds.bench.rank_memory import PeakMemory
from proper_ds.bench.workloads import PRESETS, Preset, random_llama
from proper_ds.config import validate
from proper_ds.data.batches import collate
from proper_ds.data.tokens import HISTORY, Example
from proper_ds.distributed.ds_config import resolve_ds
from proper_ds.distributed.engine import RankEngine
from proper_ds.distributed.local_ranks import run_local_ranks
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

NUM_STEPS, TIMEOUT_S = 2, 900.0
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


def on_ranks(payload: dict[str, Any]) -> dict[str, Any]:
    """What each rank runs on `base`, after the same with `tiny`: peak bytes above those before, and losses."""
    folder, sharded, checkpointed = payload["folder"], payload["sharded"], payload["checkpointed"]
    _Training(folder, "tiny", sharded, checkpointed).run(NUM_STEPS)
    gc.collect()
    memory, found = PeakMemory(), dict[str, Any]()
    before = memory.now()
    memory.begin()
    training = _Training(folder, "base", sharded, checkpointed)
    found["load"] = memory.take() - before
    memory.begin()
    found["losses"] = training.run(NUM_STEPS)
    found["train"] = memory.take() - before
    return found


class _Training:
    """The population stage's module and engine on a base in a folder, under ZeRO 3."""

    def __init__(self, folder: str, base: str, sharded: bool, checkpointed: bool) -> None:
        raw = {"output_dir": f"{folder}/run", "base": {"model": f"{folder}/{base}", "dtype": "float32"}}
        context = RunContext(validate(raw | {"data": {"path": folder}}, "benchmark"), torch.device("cpu"))
        settings, self._ranks = PopulationConfig(per_device_train_batch_size=2), current_ranks(1)
        num_ranks = self._ranks.num_ranks
        ds_config, problems = resolve_ds({"zero_optimization": ZERO_3}, "population", settings, num_ranks, False)
        assert not problems, problems
        lm = context.load_lm(with_population=False, zero3=ds_config if sharded else None)
        if checkpointed:
            checkpoint_layers(lm, holding)
        targets = find_targets(lm, settings.lora.target_modules)
        module = PopulationModule(PersonalModel(lm, targets), LoraLayout.of(targets, settings.lora), 0.0, seed=0)
        self._vocab_size = int(lm.config.vocab_size)
        self._engine = RankEngine(module, ds_config, self._ranks)

    def run(self, num_steps: int) -> list[float]:
        """Cross-entropy of each step."""
        num, losses = self._ranks.num_ranks, []
        for step in range(num_steps):
            ids = np.random.default_rng([step, self._ranks.rank]).integers(3, self._vocab_size, (2, 48))
            examples = [Example(0, HISTORY, 0, position, 40, row.astype(np.int64)) for position, row in enumerate(ids)]
            batch = RankBatch(collate(examples, self._ranks.device), 1.0, 16 * num, 2 * num)
            losses.append(self._ranks.sum([self._engine.step([batch], 1e-3)["ce"]])[0])
        self._engine.close()
        return losses


def measure(folder: Path, num_ranks: int, sharded: bool, checkpointed: bool) -> dict[str, Any]:
    """Peak bytes of the rank that has most, while loading and in training; and losses."""
    payload = {"folder": str(folder), "sharded": sharded, "checkpointed": checkpointed}
    ranks = run_local_ranks("proper_ds.bench.group_memory:on_ranks", num_ranks, payload, TIMEOUT_S)
    return ranks[0] | {phase: max(rank[phase] for rank in ranks) for phase in ("load", "train")}


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
