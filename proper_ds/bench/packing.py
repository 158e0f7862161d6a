"""Rows of several examples against padding, on lengths as people write: many short, a few long (Pareto).

`proper-ds bench data --what packing` calls it: the population stage's module, the same examples in every variant.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from proper_ds.bench.harness import in_turn, machine, tell, write_result
from proper_ds.bench.workloads import FIRST_TOKEN, PRESETS, Preset, random_llama
from proper_ds.data.batches import Batch, collate
from proper_ds.data.indices import Chosen
from proper_ds.data.order import POOL_BATCHES, Order
from proper_ds.data.tokens import HISTORY, Example
from proper_ds.errors import UserError
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.config import ATTENTION, LoraSettings
from proper_ds.model.lora import LoraLayout
from proper_ds.model.routing import Rows
from proper_ds.training.population import PopulationModule
from proper_ds.training.rank_batch import RankBatch

SHORTEST, LONGEST, SHAPE = 16, 512, 1.1
"""Tokens of an example: `SHORTEST` times a Pareto variable of this shape, `LONGEST` at most."""
MAX_DIFFERENCE = 1e-5


class _InMemory:
    """Examples as one block; see `data/order.py`."""

    def __init__(self, examples: list[Example]) -> None:
        self._examples, self.counts = examples, np.asarray([len(examples)])

    def block(self, number: int) -> Chosen:
        """All of them."""
        lengths = np.asarray([len(example.ids) for example in self._examples])
        return Chosen(np.arange(len(lengths)), lengths, np.asarray([e.num_targets for e in self._examples]))


def random_texts(preset: Preset, count: int) -> list[Example]:
    """Examples of Pareto lengths, a seventh of each its answer."""
    generator = np.random.default_rng(0)
    lengths = np.minimum(LONGEST, SHORTEST * (1 + generator.pareto(SHAPE, count))).astype(int)
    return [
        Example(n, HISTORY, 0, n, length - length // 7, generator.integers(FIRST_TOKEN, preset.vocab_size, length))
        for n, length in enumerate(lengths.tolist())
    ]


def _module(preset: Preset) -> PopulationModule:
    lm = random_llama(preset, torch.float32, torch.device("cpu"))
    targets = find_targets(lm, ATTENTION)
    layout = LoraLayout.of(targets, LoraSettings(r=preset.r, target_modules=ATTENTION))
    return PopulationModule(PersonalModel(lm, targets), layout, 0.0, seed=1)


def _epoch(module: PopulationModule, batches: list[Batch]) -> float:
    """Forward and backward of every batch; the mean loss per target."""
    num_targets, total = sum(len(batch.target_K) for batch in batches), 0.0
    for batch in batches:
        loss, _ = module(RankBatch(batch, 1.0, num_targets, 1, Rows(text_RT=batch.text_RT)))
        loss.backward()
        total += float(loss.detach())
    return total


def bench_packing(preset_name: str, batch_size: int, repeats: int, json_path: Path | None) -> None:
    """Measure, print, and write the figures. Raises UserError where the variants do not compute the same."""
    preset = PRESETS[preset_name]
    examples = random_texts(preset, batch_size * POOL_BATCHES)
    module, made = _module(preset), dict[str, list[Batch]]()
    for by_length, name in ((True, "of similar length"), (False, "at random")):
        order = Order(_InMemory(examples), batch_size, seed=1, by_length=by_length)
        batches = [[examples[i] for i in batch.indices] for batch in islice(order.batches(), order.batches_per_epoch)]
        for packing in (False, True):
            label = f"{name}, {'packed' if packing else 'padded'}"
            made[label] = [collate(batch, packing=packing) for batch in batches]
    losses: dict[str, float] = {}

    def on_done(name: str, number: int, seconds: float, result: Any) -> None:
        losses[name] = result

    measured = in_turn({name: partial(_epoch, module, batches) for name, batches in made.items()}, repeats, on_done)
    difference = max(losses.values()) - min(losses.values())
    if difference > MAX_DIFFERENCE:
        raise UserError(f"the variants do not compute the same: losses differ by {difference:.1e}")
    num_tokens = sum(len(example.ids) for example in examples)
    padding = {name: 1 - num_tokens / sum(batch.ids_RT.numel() for batch in made[name]) for name in made}
    rates = {name: seconds.per(num_tokens) for name, seconds in measured.items()}
    rows = [[name, f"{padding[name]:.1%}", f"{rate.median:,.0f} ({rate.spread:.0%})"] for name, rate in rates.items()]
    result = {
        "padding": padding,
        "tokens_per_s": {name: rate.values for name, rate in rates.items()},
        "max_loss_difference": difference,
        "machine": machine(),
    }
    shape = f"{len(examples)} examples of {SHORTEST} to {LONGEST} tokens, {num_tokens / len(examples):.0f} on average"
    notes = [f"{preset_name}, {shape}, {batch_size} in a micro-batch; losses within {difference:.1e}"]
    tell("Packing", ["micro-batches", "padding", "tokens/s (spread)"], rows, notes, result)
    write_result(json_path, result)
