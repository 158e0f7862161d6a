"""The step loop that population, group and router stages share: batches, checkpoints, metrics, resume.

Runs on every rank inside `fleet/gang.py`; what differs between the stages is in their own files.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from proper_ds.data.batches import Step, StepPlan
from proper_ds.distributed.checkpoint import Checkpoint, Checkpoints
from proper_ds.distributed.ds_config import read_ds_file, resolve_ds, zero_stage
from proper_ds.distributed.engine import RankEngine
from proper_ds.distributed.ranks import Ranks
from proper_ds.distributed.sharded_base import holding
from proper_ds.errors import ConfigError, FleetError
from proper_ds.files import seed_of
from proper_ds.model.checkpointing import checkpoint_layers
from proper_ds.observe.log import get_logger
from proper_ds.observe.metrics import MetricsFile
from proper_ds.training.config import RankTraining
from proper_ds.training.context import RunContext
from proper_ds.training.rank_batch import RankBatch
from proper_ds.training.schedule import learning_rate

Tensor = torch.Tensor

CHECKPOINT = "checkpoint"
"""A stage's folder of checkpoints, removed once its result is committed."""


class RankStage(ABC):
    """One of the stages that run on ranks.

    Attributes:
        name: the stage's folder below the run, as `group/proper`; also its name in metrics.
        section: its section in the configuration.
        module: maps a RankBatch to (loss, numbers to log).
    """

    name: str
    section: str
    module: nn.Module

    def __init__(self, context: RunContext) -> None:
        self.context = context

    @property
    @abstractmethod
    def settings(self) -> RankTraining:
        """The stage's section."""

    def load_lm(self, with_population: bool) -> Any:
        """The frozen base: whole, or this rank's shards of it under ZeRO 3."""
        ds_config = self.ds_config(torch.distributed.get_world_size())
        lm = self.context.load_lm(with_population, ds_config if zero_stage(ds_config) == 3 else None)
        if self.settings.gradient_checkpointing:
            checkpoint_layers(lm, holding)
        return lm

    def ds_config(self, num_ranks: int) -> dict[str, Any]:
        """The stage's DeepSpeed configuration. Raises ConfigError for what contradicts it on this device."""
        config, device = self.context.config, self.context.device
        bf16 = self.context.dtype == torch.bfloat16
        raw = read_ds_file(config.distributed.deepspeed)
        resolved, problems = resolve_ds(raw, self.section, self.settings, num_ranks, bf16, self.context.hidden_size)
        if problems:  # base.dtype `auto` is known only here
            raise ConfigError(f"{config.distributed.deepspeed} on {device.type}", problems)
        return resolved

    @abstractmethod
    def indices(self) -> np.ndarray:
        """The examples to learn from."""

    @abstractmethod
    def batch(self, indices: np.ndarray, step: Step, number: int) -> RankBatch:
        """One micro-batch of optimizer step `number`."""

    def check_result(self, batch: RankBatch, ranks: Ranks) -> None:  # noqa: B027 - most stages have nothing to do here
        """Raise AdapterError for a result that cannot be used; called on every rank after training, a collective."""

    @abstractmethod
    def finish(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write the result; called on the first rank only."""

    def before_start(self, metrics: MetricsFile) -> None:  # noqa: B027 - most stages have nothing to do here
        """Called on the first rank before a fresh start."""


def run_rank_stage(stage: RankStage, ranks: Ranks, fingerprint: str) -> None:
    """Train a stage to its end, from its last checkpoint where there is one; a collective of all ranks."""
    plan = make_plan(stage, ranks.num_ranks)
    folder = stage.context.folder.stage(stage.name).path
    checkpoints = Checkpoints(folder / CHECKPOINT, fingerprint)
    metrics = MetricsFile(stage.context.folder.metrics)
    checkpoint = checkpoints.latest()
    if checkpoint is not None:
        load_trained(stage.module, checkpoint.tensors)
        get_logger().info("%s: goes on after step %d of %d", stage.name, checkpoint.num_steps, plan.num_steps)
    elif ranks.is_first:
        stage.before_start(metrics)
    engine = RankEngine(stage.module.to(ranks.device), stage.ds_config(ranks.num_ranks), ranks)
    _train(stage, engine, plan, checkpoints, checkpoint, metrics)
    stage.check_result(_any_batch(stage, plan, ranks), ranks)
    weights = engine.weights()
    if ranks.is_first:
        stage.finish(weights, folder)
    ranks.barrier()
    engine.close()


def make_plan(stage: RankStage, num_ranks: int) -> StepPlan:
    """The stage's order of examples."""
    tokens, settings, indices = stage.context.tokens, stage.settings, stage.indices()
    lengths = tokens.column("num_tokens")[indices]
    return StepPlan(
        indices,
        lengths,
        lengths - tokens.column("num_prompt")[indices],
        num_ranks=num_ranks,
        per_rank=settings.per_device_train_batch_size,
        accumulation=settings.gradient_accumulation_steps,
        num_epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
        seed=seed_of(stage.context.config.seed, stage.name),
    )


def load_trained(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put a checkpoint's weights into the module before the engine takes it over."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[f"weight/{name}"])


def _train(
    stage: RankStage,
    engine: RankEngine,
    plan: StepPlan,
    checkpoints: Checkpoints,
    checkpoint: Checkpoint | None,
    metrics: MetricsFile,
) -> None:
    settings, ranks = stage.settings, engine.ranks
    first = checkpoint.num_steps if checkpoint is not None else 0
    window = _Window(stage.name, plan.num_steps, metrics)
    for number, step in enumerate(plan.steps(first), start=first):
        batches: list[RankBatch] = [stage.batch(parts[ranks.rank], step, number) for parts in step.micro]
        if checkpoint is not None:
            engine.restore(checkpoint.tensors, checkpoint.num_steps, batches[0])
            checkpoint = None
        rate = learning_rate(settings, number, plan.num_steps)
        window.add(engine.step(batches, rate), step)
        done = number + 1
        if done % settings.logging_steps == 0 or done == plan.num_steps:
            window.close(done, rate, ranks)
        if done % settings.save_steps == 0 and done < plan.num_steps:
            state = engine.state()
            if ranks.is_first:
                checkpoints.save(done, state)
    if checkpoint is not None:  # it was written after the last step, so there is nothing left to do but finish
        engine.restore(checkpoint.tensors, checkpoint.num_steps, _any_batch(stage, plan, ranks))


def _any_batch(stage: RankStage, plan: StepPlan, ranks: Ranks) -> RankBatch:
    step = next(plan.steps())
    return stage.batch(step.micro[0][ranks.rank], step, 0)


class _Window:
    """Sums what steps report, and logs their means over all ranks every few steps."""

    def __init__(self, stage: str, num_steps: int, metrics: MetricsFile) -> None:
        self._stage, self._num_steps, self._metrics = stage, num_steps, metrics
        self._sums: dict[str, float] = {}
        self._num_targets = self._num_rows = self._num = 0
        self._start_s = time.perf_counter()

    def add(self, numbers: dict[str, float], step: Step) -> None:
        for name, value in numbers.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._num_targets += step.num_targets
        self._num_rows += step.num_rows
        self._num += 1

    def close(self, done: int, rate: float, ranks: Ranks) -> None:
        """Log the window's means; a collective. `ce` is per target token, the rest per row."""
        norm = self._sums.pop("grad_norm", 0.0) / self._num
        names = sorted(self._sums)
        sums = dict(zip(names, ranks.sum([self._sums[name] for name in names]), strict=True))
        loss = sums.pop("ce") / self._num_targets
        num_tokens = sums.pop("tokens")
        seconds = time.perf_counter() - self._start_s
        values = {name: value / self._num_rows for name, value in sums.items()}
        if not np.isfinite(loss):
            raise FleetError(
                f"{self._stage}: the loss is {loss} at step {done}; lower its learning_rate or max_grad_norm,"
                " or look for broken text in the data"
            )
        if ranks.is_first:
            self._metrics.log(
                self._stage,
                step=done,
                num_steps=self._num_steps,
                loss=loss,
                learning_rate=rate,
                grad_norm=norm,
                tokens_per_s=num_tokens / seconds,
                **values,
            )
        self._sums, self._num_targets, self._num_rows, self._num = {}, 0, 0, 0
        self._start_s = time.perf_counter()
