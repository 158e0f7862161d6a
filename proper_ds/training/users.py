"""Stage 3.1: train many users side by side on one device; a plain function of tensors that runs anywhere.

For every user the result equals training that user alone: own adapter, own order of items, own loss normalisation,
own clipping, schedule, step counter and moments. The fleet's actors call `train_users`; nothing here knows of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from proper_ds.model.adapted import PersonalModel
from proper_ds.model.lora import LoraLayout
from proper_ds.model.norms import fused_norms
from proper_ds.model.routing import Rows
from proper_ds.model.user_start import UserStart
from proper_ds.training.config import UserConfig
from proper_ds.training.slots import SlotPool, UserTask, num_user_steps

Tensor = torch.Tensor

READ_TICKS = 8
"""Losses are read back after so many ticks, so that the device seldom waits for the host."""
CPU_SLOTS, GPU_SLOTS = 64, 1024
SLOT_MEMORY_SHARE = 0.25
SLOT_BYTES = 24
"""Weight, gradient, two moments and the update's two temporaries of one number, in fp32."""


@dataclass(frozen=True)
class UserResult:
    """An adapter, or the reason why there is none.

    Attributes:
        row_P: the adapter on the CPU, of the user's own rank (`user.rank_by_history`), or None.
        losses: mean loss per target token in each of the user's steps.
    """

    key: str
    row_P: Tensor | None
    reason: str = ""
    losses: list[float] = field(default_factory=list)
    num_items: int = 0


@dataclass
class TickCounters:
    """Ticks counted up, for benchmarks.

    Attributes:
        num_ticks: optimizer steps of all users together.
        num_tokens, num_padded: tokens run, without and with padding; a shared prefix counts once.
        num_slots, num_taken: slots over the ticks, and those of them with a user.
    """

    num_ticks: int = 0
    num_tokens: int = 0
    num_padded: int = 0
    num_slots: int = 0
    num_taken: int = 0

    def count(self, pool: SlotPool) -> None:
        """Add the pool's last tick."""
        self.num_ticks += 1
        self.num_tokens += pool.num_real
        self.num_padded += pool.num_padded
        self.num_slots += pool.buffers.num_slots
        self.num_taken += len(pool.sitting)

    @property
    def occupancy(self) -> float:
        """Share of the slots that had a user; 1 where there was no tick."""
        return self.num_taken / self.num_slots if self.num_slots else 1.0

    @property
    def padding(self) -> float:
        """Share of the tokens run that were padding."""
        return 1 - self.num_tokens / self.num_padded if self.num_padded else 0.0


@dataclass
class Counters:
    """What a call of `train_users` did, all in all, and while users were waiting for a slot (before the tail)."""

    whole: TickCounters = field(default_factory=TickCounters)
    waiting: TickCounters = field(default_factory=TickCounters)


def train_users(
    model: PersonalModel,
    layout: LoraLayout,
    tasks: Sequence[UserTask],
    settings: UserConfig,
    seed: int,
    counters: Counters | None = None,
    start: UserStart | None = None,
) -> list[UserResult]:
    """Train one adapter for each task; results come in the order of `tasks`.

    Slots that finish their user are refilled at once, longest users first. One bad user never raises: a loss or
    weight that is not finite ends that user alone, with the reason in its result.

    Args:
        model: the frozen base with its group experts, if any, attached; user slots are attached here and left off.
        layout: where a user's adapter sits.
        settings: the run's `user` section.
        seed: the run's seed.
        counters: counted up, where given.
        start: a learned start for everybody, in place of a fresh adapter each.
    """
    results: dict[str, UserResult] = {}
    queue: list[UserTask] = []
    for task in tasks:
        if task.examples:
            queue.append(task)
        else:
            results[task.key] = UserResult(task.key, None, "no history")
    queue.sort(key=lambda task: (num_user_steps(len(task.examples), settings), task.key))
    num_slots = _num_slots(settings, model, layout.num_parameters)
    pool = SlotPool(model, layout, settings, seed, max(1, min(num_slots, len(queue))), start)
    try:
        with fused_norms(model.lm):
            _work_through(pool, queue, results, counters)
    finally:
        model.attach_users(None)
        model.set_rows(Rows())
    return [results[task.key] for task in tasks]


def _work_through(
    pool: SlotPool, queue: list[UserTask], results: dict[str, UserResult], counters: Counters | None
) -> None:
    free = list(range(pool.buffers.num_slots))[::-1]
    while queue or pool.sitting:
        while queue and free:
            pool.seat(free.pop(), queue.pop())
        pool.tick()
        if counters is not None:
            for each in (counters.whole, counters.waiting) if queue else (counters.whole,):
                each.count(pool)
        for number, reason in _leaving(pool).items():
            result = _result(pool, number, reason)
            results[result.key] = result
            free.append(number)
        free.sort(reverse=True)  # the lowest first: the optimizer passes over blocks of slots without users


def _num_slots(settings: UserConfig, model: PersonalModel, num_parameters: int) -> int:
    """As configured; `auto` goes by the device's whole memory less the base, so that equal devices agree on it."""
    if settings.num_slots != "auto":
        return settings.num_slots
    if model.device.type != "cuda":
        return CPU_SLOTS
    base_bytes = sum(p.numel() * p.element_size() for p in model.lm.parameters())
    memory_bytes = torch.cuda.get_device_properties(model.device).total_memory - base_bytes
    return max(1, min(GPU_SLOTS, int(memory_bytes * SLOT_MEMORY_SHARE) // (num_parameters * SLOT_BYTES)))


def _leaving(pool: SlotPool) -> dict[int, str]:
    """Slots whose user is done, or cannot go on and why."""
    settings = pool.settings
    patience, threshold = settings.early_stopping_patience, settings.early_stopping_threshold
    done = [number for number, s in pool.sitting.items() if s.step == s.num_steps]
    if done or patience is not None or len(pool.unread) >= READ_TICKS:
        pool.read()
    found = dict.fromkeys(done, "")
    for number, sitter in pool.sitting.items():
        bad = next((n for n, loss in enumerate(sitter.losses, 1) if not math.isfinite(loss)), None)
        if bad is not None:
            found[number] = f"loss is {sitter.losses[bad - 1]} in step {bad}"
        elif number not in found and not pool.unread and sitter.wants_to_stop(patience, threshold):
            found[number] = ""
    return found


def _result(pool: SlotPool, number: int, reason: str) -> UserResult:
    sitter, row_P = pool.take(number)
    if not reason and not bool(row_P.isfinite().all()):
        reason = "weights are not finite"
    own = pool.layout.with_rank(sitter.r)
    if not reason and not own.has_effect(row_P):
        reason = f"the adapter has no effect after {sitter.step} steps (learning rate 0: warm-up, or too few steps)"
    return UserResult(sitter.task.key, None if reason else row_P, reason, sitter.losses, len(sitter.task.examples))
