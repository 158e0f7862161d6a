"""The step loop that population, group and router stages share: batches, checkpoints, metrics, resume.

Runs on every rank inside `fleet/gang.py`; what differs between the stages is in their own files.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from proper_ds.data.batches import Step, StepPlan
from proper_ds.data.indices import Indices
from proper_ds.distributed.apart import Apart
from proper_ds.distributed.checkpoint import Checkpoint, Checkpoints
from proper_ds.distributed.ds_config import read_ds_file, resolve_ds, zero_stage
from proper_ds.distributed.engine import RankEngine, refuse_bad_values
from proper_ds.distributed.ranks import Ranks
from proper_ds.distributed.sharded_base import holding
from proper_ds.errors import ConfigError, FleetError
from proper_ds.files import seed_of
from proper_ds.model.checkpointing import checkpoint_layers
from proper_ds.observe.log import get_logger
from proper_ds.observe.metrics import MetricsFile
from proper_ds.run_folder import in_lane
from proper_ds.training.config import RankTraining
from proper_ds.training.context import RunContext
from proper_ds.training.rank_batch import RankBatch
from proper_ds.training.schedule import learning_rate

Tensor = torch.Tensor

CHECKPOINT = "checkpoint"
"""A stage's folder of checkpoints, removed once its result is committed."""
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
"""What a DeepSpeed file may say of batches."""


class RankStage(ABC):
    """One of the stages that run on ranks.

    Attributes:
        name: the stage's folder within its lane, as `group/proper`.
        section: its section in the configuration.
        module: maps a RankBatch to (loss, numbers to log).
        num_owners: examples of owner o go to ranks r with `r % num_owners == o`; 1 where any rank may see any.
    """

    num_owners = 1

    name: str
    section: str
    module: nn.Module

    def __init__(self, context: RunContext) -> None:
        self.context = context

    @property
    def title(self) -> str:
        """The stage's full name, in metrics and messages."""
        return in_lane(self.name, self.context.lane)

    @property
    @abstractmethod
    def settings(self) -> RankTraining:
        """The stage's section."""

    def load_lm(self, with_population: bool) -> Any:
        """The frozen base: whole, or this rank's shards of it under ZeRO 3."""
        num_ranks = torch.distributed.get_world_size()
        ds_config = self.ds_config(num_ranks, self.settings.num_micro_batches(num_ranks))
        lm = self.context.load_lm(with_population, ds_config if zero_stage(ds_config) == 3 else None)
        if self.settings.gradient_checkpointing:
            checkpoint_layers(lm, holding)
        return lm

    def ds_config(self, num_ranks: int, accumulation: int) -> dict[str, Any]:
        """The stage's DeepSpeed configuration for the ranks that are there.

        Its batch sizes are of this gang: what the file says of them was checked against the configured ranks.

        Raises:
            ConfigError: for what contradicts the file on this device.
        """
        distributed, device = self.context.config.distributed, self.context.device
        raw = read_ds_file(distributed.deepspeed) | dict.fromkeys(BATCH_KEYS, "auto")
        settings = self.settings.model_copy(update={"gradient_accumulation_steps": accumulation})
        bf16 = self.context.dtype == torch.bfloat16
        resolved, problems = resolve_ds(raw, self.section, settings, num_ranks, bf16, self.context.hidden_size)
        if problems:  # base.dtype `auto` is known only here
            raise ConfigError(f"{distributed.deepspeed} on {device.type}", problems)
        refuse_bad_values(resolved, distributed.deepspeed, device.type == "cuda")
        return resolved

    @abstractmethod
    def indices(self) -> Indices:
        """The examples to learn from."""

    @abstractmethod
    def batch(self, indices: np.ndarray, step: Step, number: int) -> RankBatch:
        """One micro-batch of optimizer step `number`."""

    def check_result(self, batch: RankBatch, ranks: Ranks) -> None:  # noqa: B027 - most stages have nothing to do here
        """Raise AdapterError for a result that cannot be used; called on every rank after training, a collective."""

    @abstractmethod
    def finish(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write the result; called on the first rank only.

        Args:
            weights: of the engine by the module's names, and of what is trained apart by its own.
        """

    def apart(self, ds_config: dict[str, Any]) -> list[Apart]:
        """What is trained beside the engine, from the resolved DeepSpeed configuration."""
        return []

    def owner_of(self, indices: np.ndarray) -> np.ndarray:
        """Of each example, which of `num_owners` must see it."""
        raise AssertionError("stages with more than one owner say who it is")

    def about(self) -> dict[str, Any]:
        """How it is spread over the ranks, for checkpoints and metrics to tell."""
        return {}

    def before_start(self, engine: RankEngine, metrics: MetricsFile) -> None:  # noqa: B027 - most have nothing to do
        """Called on all ranks before a fresh start, once the engine holds the module; a collective."""

    def before_finish(self, checkpoint: Checkpoint) -> None:  # noqa: B027 - most have nothing to do
        """Called on all ranks with the last checkpoint, before the first one writes the result; a collective."""

    def drop_counts(self) -> None:  # noqa: B027 - most count nothing
        """Forget what forward passes were counted for `log_more`: they were no training."""

    def log_more(self, ranks: Ranks) -> dict[str, Any]:
        """More for the line of metrics about to be written; a collective."""
        return {}


def run_rank_stage(stage: RankStage, ranks: Ranks, fingerprint: str) -> int:
    """Train a stage to its end, from its newest checkpoint where there is one; a collective of all ranks.

    The number of ranks may be another than the configured one, and another than the checkpoint's: the examples of an
    optimizer step stay the same. Random states need no saving: the order of examples, dropout and augmentation are
    functions of seed, step and example.

    Returns:
        Examples of each optimizer step over all ranks: as configured, or as the checkpoint was begun with.
    """
    settings = stage.settings
    folder = stage.context.stage(stage.name).path
    checkpoints = Checkpoints(folder / CHECKPOINT, fingerprint, settings.save_total_limit)
    metrics = MetricsFile(stage.context.folder.metrics)
    checkpoint = checkpoints.latest(ranks)
    for damage in checkpoints.warnings:
        warning = f"{damage}; the checkpoint before it is taken"
        get_logger().warning("%s: %s", stage.title, warning)
        metrics.log(stage.title, warning=warning)
    train_batch_size = settings.global_batch_size(stage.context.config.distributed.num_ranks)
    if checkpoint is not None:
        train_batch_size = checkpoint.about["train_batch_size"]
    plan = make_plan(stage, ranks.num_ranks, train_batch_size)
    if checkpoint is not None:
        load_trained(stage.module, checkpoint.tensors)
    ds_config = stage.ds_config(ranks.num_ranks, plan.accumulation)
    engine = RankEngine(stage.module.to(ranks.device), ds_config, ranks, stage.apart(ds_config))
    about = {"train_batch_size": train_batch_size, "num_ranks": ranks.num_ranks, "zero_stage": zero_stage(ds_config)}
    about |= stage.about()
    if ranks.is_first:
        _say_where_it_begins(stage, plan, checkpoint, about, metrics)
    if checkpoint is None:
        stage.before_start(engine, metrics)
    saving = _Saving(checkpoints, about)
    _train(stage, engine, plan, saving, checkpoint, metrics)
    if checkpoint is None or checkpoint.num_steps < plan.num_steps:
        saving.save(plan.num_steps, engine)
        checkpoint = checkpoints.latest(ranks)
        if checkpoint is None or checkpoint.num_steps < plan.num_steps:
            raise FleetError(f"{stage.title}: {'; '.join(checkpoints.warnings)}, just written; look at the storage")
    assert checkpoint is not None
    stage.check_result(_any_batch(stage, plan, ranks), ranks)
    stage.before_finish(checkpoint)
    ranks.barrier()
    if ranks.is_first:  # the last checkpoint holds whole what the ranks have in parts
        stage.finish(checkpoint.weights(), folder)
    ranks.barrier()
    engine.close()
    return int(train_batch_size)


def make_plan(stage: RankStage, num_ranks: int, train_batch_size: int) -> StepPlan:
    """The stage's order of examples, `train_batch_size` of them in each step, dealt to so many ranks."""
    settings = stage.settings
    return StepPlan(
        stage.indices(),
        num_ranks=num_ranks,
        per_device=settings.per_device_train_batch_size,
        train_batch_size=train_batch_size,
        num_epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
        seed=seed_of(stage.context.config.seed, stage.name),
        by_length=settings.by_length,
        owner_of=stage.owner_of if stage.num_owners > 1 else None,
        num_owners=stage.num_owners,
    )


def _say_where_it_begins(
    stage: RankStage, plan: StepPlan, checkpoint: Checkpoint | None, about: dict[str, Any], metrics: MetricsFile
) -> None:
    """For the log and, by way of the metrics, for the driver's terminal."""
    first = checkpoint.num_steps if checkpoint is not None else 0
    metrics.log(stage.title, event="begins", from_step=first, num_steps=plan.num_steps, **about)
    if checkpoint is None:
        return
    get_logger().info("%s: goes on after step %d of %d", stage.title, first, plan.num_steps)
    before = {name: checkpoint.about.get(name) for name in about}
    if before != about:
        get_logger().info("%s: the checkpoint was written under %s, it goes on under %s", stage.title, before, about)


def load_trained(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put a checkpoint's weights into the module before the engine takes it over."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[f"weight/{name}"])


@dataclass(frozen=True)
class _Saving:
    """Where checkpoints go, and what they say of how they were made."""

    checkpoints: Checkpoints
    about: dict[str, Any]

    def save(self, num_steps: int, engine: RankEngine) -> None:
        """A collective."""
        self.checkpoints.save(num_steps, engine.state(), engine.shards(), self.about, engine.ranks)


def _train(
    stage: RankStage,
    engine: RankEngine,
    plan: StepPlan,
    saving: _Saving,
    checkpoint: Checkpoint | None,
    metrics: MetricsFile,
) -> None:
    settings, ranks = stage.settings, engine.ranks
    first = checkpoint.num_steps if checkpoint is not None else 0
    window = _Window(stage.title, plan.num_steps, metrics)
    told = settings.per_device_train_batch_size
    for number, step in enumerate(plan.steps(first), start=first):
        if step.largest > told:
            told = step.largest
            if ranks.is_first:
                _say_how_large(stage, told, number + 1, metrics)
        batches: list[RankBatch] = [stage.batch(parts[ranks.rank], step, number) for parts in step.micro]
        if checkpoint is not None:
            engine.restore(checkpoint, batches[0])
            stage.drop_counts()
            checkpoint = None
        rate = learning_rate(settings, number, plan.num_steps)
        done = number + 1
        try:
            window.add(engine.step(batches, rate), step)
        except FleetError as error:
            raise FleetError(f"{stage.title}, step {done}: {error}") from None
        if done % settings.logging_steps == 0 or done == plan.num_steps:
            window.close(done, rate, ranks, stage.log_more(ranks))
        if done % settings.save_steps == 0 and done < plan.num_steps:
            saving.save(done, engine)


def _say_how_large(stage: RankStage, num: int, number: int, metrics: MetricsFile) -> None:
    """Warn of the largest micro-batch so far: which examples a rank must see says how many they are, not memory."""
    key, limit = f"{stage.section}.per_device_train_batch_size", stage.settings.per_device_train_batch_size
    warning = (
        f"step {number} has {num} examples at once on one rank, more than {key} {limit}: so many belong to users it"
        f" holds; if memory is short, lower it beside a {stage.section}.train_batch_size: micro-batches are more then,"
        " and smaller"
    )
    get_logger().warning("%s: %s", stage.title, warning)
    metrics.log(stage.title, warning=warning)


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

    def close(self, done: int, rate: float, ranks: Ranks, more: dict[str, Any]) -> None:
        """Log the window's means; a collective. `ce` is per target token, the rest per row."""
        norm = self._sums.pop("grad_norm", 0.0) / self._num
        names = sorted(self._sums)
        sums = dict(zip(names, ranks.sum([self._sums[name] for name in names]), strict=True))
        loss = sums.pop("ce") / self._num_targets
        num_tokens = sums.pop("tokens")
        seconds = time.perf_counter() - self._start_s
        values = {name: value / self._num_rows for name, value in sums.items()}
        if ranks.is_first:
            self._metrics.log(
                self._stage,
                step=done,
                num_steps=self._num_steps,
                loss=loss,
                learning_rate=rate,
                grad_norm=norm,
                num_tokens=int(num_tokens),
                tokens_per_s=num_tokens / seconds,
                **values,
                **more,
            )
        self._sums, self._num_targets, self._num_rows, self._num = {}, 0, 0, 0
        self._start_s = time.perf_counter()
