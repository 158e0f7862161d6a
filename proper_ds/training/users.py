"""Stage 3.1: train many users side by side on one device; a plain function of tensors that runs anywhere.

For every user the result equals training that user alone: own adapter, own order of items, own loss normalisation,
own clipping, schedule, step counter and moments. The fleet's actors call `train_users`; nothing here knows of them.
Shapes: R rows, K target tokens, S slots, P numbers in one adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from proper_ds.data.batches import collate, length_batches
from proper_ds.data.tokens import Example
from proper_ds.files import seed_of
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.lora import LoraLayout, SlotBuffers
from proper_ds.model.routing import Rows
from proper_ds.training.config import UserConfig
from proper_ds.training.optim import SlotAdamW
from proper_ds.training.schedule import learning_rate

Tensor = torch.Tensor


@dataclass(frozen=True)
class UserTask:
    """One user to be trained.

    Attributes:
        key: the user's key; with `seed` it decides the initial adapter and the order of items.
        examples: the history as training pairs, oldest first.
        user_vector_U: for presets with a user encoder.
        table_line: for presets with a user table.
        initial_row_P: where the adapter starts instead of at its seeded initial row: a warm start.
    """

    key: str
    examples: Sequence[Example]
    user_vector_U: Tensor | None = None
    table_line: int = 0
    initial_row_P: Tensor | None = None


@dataclass(frozen=True)
class UserResult:
    """An adapter, or the reason why there is none.

    Attributes:
        row_P: the adapter on the CPU, or None.
        losses: mean loss per target token in each of the user's steps.
    """

    key: str
    row_P: Tensor | None
    reason: str = ""
    losses: list[float] = field(default_factory=list)
    num_items: int = 0


def item_order(num_items: int, num_steps: int, per_step: int, seed: int) -> Iterator[np.ndarray]:
    """Positions of the items of each step: every epoch a new permutation, cut into steps."""
    done = 0
    epoch = 0
    while done < num_steps:
        order = np.random.default_rng(seed_of(seed, "epoch", epoch)).permutation(num_items)
        for start in range(0, num_items, per_step):
            if done == num_steps:
                return
            yield order[start : start + per_step]
            done += 1
        epoch += 1


def num_user_steps(num_items: int, settings: UserConfig) -> int:
    """Optimizer steps of a user with `num_items` items: whole epochs, repeated until `min_steps` are made."""
    per_epoch = math.ceil(num_items / settings.per_device_train_batch_size)
    epochs = max(settings.num_train_epochs, math.ceil(settings.min_steps / per_epoch))
    return per_epoch * epochs


class _Slot:
    """What one user needs while occupying a slot."""

    def __init__(self, task: UserTask, settings: UserConfig, seed: int) -> None:
        self.task = task
        self.seed = seed_of(seed, "user", task.key)
        self.num_steps = num_user_steps(len(task.examples), settings)
        self.step = 0
        self.losses: list[float] = []
        per_step = settings.per_device_train_batch_size
        self.order = item_order(len(task.examples), self.num_steps, per_step, self.seed)

    def next_examples(self) -> list[Example]:
        """The examples of this user's next step."""
        return [self.task.examples[i] for i in next(self.order)]

    def dropout_key(self, example: Example) -> int:
        """The same for this user, step and item, whatever else is in the batch."""
        return seed_of(self.seed, self.step, example.position)


class _Pool:
    """The slots, their buffers and optimizer, and who sits where."""

    def __init__(self, model: PersonalModel, layout: LoraLayout, settings: UserConfig, seed: int, num: int) -> None:
        self.model, self.layout, self.settings, self.seed = model, layout, settings, seed
        dtype = torch.float64 if model.lm.dtype == torch.float64 else torch.float32
        self.buffers = SlotBuffers(layout, num, dtype, model.device, trainable=True)
        self.optimizer = SlotAdamW(self.buffers.weights_SP, settings)
        self.sitting: dict[int, _Slot] = {}
        model.attach_users(self.buffers.modules(), settings.lora.lora_dropout)

    def seat(self, number: int, task: UserTask) -> None:
        """Give a slot to a user: fresh adapter or the given one, fresh moments."""
        assert self.buffers.grads_SP is not None
        slot = _Slot(task, self.settings, self.seed)
        row_P = task.initial_row_P
        if row_P is None:
            row_P = self.layout.initial_row(slot.seed, self.buffers.weights_SP.dtype)
        self.buffers.weights_SP[number] = row_P.to(self.buffers.weights_SP.device)
        self.buffers.grads_SP[number] = 0
        self.optimizer.reset(number)
        self.sitting[number] = slot

    def leave(self, number: int, reason: str = "") -> UserResult:
        """Free a slot and return what its user takes along."""
        slot = self.sitting.pop(number)
        row_P = self.buffers.weights_SP[number].detach().cpu().clone()
        if not reason and not bool(row_P.isfinite().all()):
            reason = "weights are not finite"
        if not reason and not self.layout.has_effect(row_P):
            reason = f"the adapter has no effect after {slot.step} steps (learning rate 0: warm-up, or too few steps)"
        return UserResult(slot.task.key, None if reason else row_P, reason, slot.losses, len(slot.task.examples))

    def tick(self) -> None:
        """One optimizer step of every seated user."""
        rows = [(number, example) for number, slot in self.sitting.items() for example in slot.next_examples()]
        num_targets = dict.fromkeys(self.sitting, 0)
        for number, example in rows:
            num_targets[number] += example.num_targets
        loss_S = torch.zeros(self.buffers.num_slots, dtype=torch.float64, device=self.model.device)
        for part in length_batches([len(e.ids) for _, e in rows], self.settings.num_tokens_per_batch):
            self._accumulate([rows[i] for i in part], num_targets, loss_S)
        active = list(self.sitting)
        rates = [learning_rate(self.settings, slot.step, slot.num_steps) for slot in self.sitting.values()]
        assert self.buffers.grads_SP is not None
        self.optimizer.step(self.buffers.weights_SP, self.buffers.grads_SP, active, rates)
        losses = loss_S.tolist()
        for number, slot in self.sitting.items():
            slot.losses.append(losses[number])
            slot.step += 1

    def _accumulate(self, rows: list[tuple[int, Example]], num_targets: dict[int, int], loss_S: Tensor) -> None:
        """Add the gradients of some rows to their slots; each user's loss is a mean over its own step's targets."""
        device = self.model.device
        batch = collate([example for _, example in rows], device)
        slots = [self.sitting[number] for number, _ in rows]
        slot_R = torch.tensor([number for number, _ in rows], device=device)
        self.model.set_rows(self._rows(slot_R, slots, [example for _, example in rows]))
        losses_K = self.model.target_losses(batch.ids_RT, batch.row_K, batch.position_K, batch.target_K)
        weight_R = torch.tensor([1 / num_targets[number] for number, _ in rows], dtype=losses_K.dtype, device=device)
        weighted_K = losses_K * weight_R[batch.row_K]
        loss_S.index_add_(0, slot_R[batch.row_K], weighted_K.detach().double())
        weighted_K.sum().backward()

    def _rows(self, slot_R: Tensor, slots: list[_Slot], examples: list[Example]) -> Rows:
        device, rows = self.model.device, Rows(slot_R)
        vectors = [slot.task.user_vector_U for slot in slots if slot.task.user_vector_U is not None]
        if vectors:
            assert len(vectors) == len(slots), "either every user has a vector or none"
            rows.user_RU = torch.stack(vectors).to(device)
        rows.table_R = torch.tensor([slot.task.table_line for slot in slots], device=device)
        if self.model.has_dropout:
            keys = [slot.dropout_key(example) for slot, example in zip(slots, examples, strict=True)]
            rows.key_R = torch.tensor(keys, dtype=torch.int64, device=device)
        return rows


def train_users(
    model: PersonalModel, layout: LoraLayout, tasks: Sequence[UserTask], settings: UserConfig, seed: int
) -> list[UserResult]:
    """Train one adapter for each task; results come in the order of `tasks`.

    Slots that finish their user are refilled at once, longest users first. One bad user never raises: a loss or
    weight that is not finite ends that user alone, with the reason in its result.

    Args:
        model: the frozen base with its group experts, if any, attached; user slots are attached here and left off.
        layout: where a user's adapter sits.
        settings: the run's `user` section.
        seed: the run's seed.
    """
    results: dict[str, UserResult] = {}
    queue: list[UserTask] = []
    for task in tasks:
        if task.examples:
            queue.append(task)
        else:
            results[task.key] = UserResult(task.key, None, "no history")
    queue.sort(key=lambda task: (num_user_steps(len(task.examples), settings), task.key))
    pool = _Pool(model, layout, settings, seed, max(1, min(settings.num_slots, len(queue))))
    free = list(range(pool.buffers.num_slots))[::-1]
    try:
        while queue or pool.sitting:
            while queue and free:
                pool.seat(free.pop(), queue.pop())
            pool.tick()
            for number, slot in list(pool.sitting.items()):
                bad = not math.isfinite(slot.losses[-1])
                if bad or slot.step == slot.num_steps:
                    reason = f"loss is {slot.losses[-1]} in step {slot.step}" if bad else ""
                    results[slot.task.key] = pool.leave(number, reason)
                    free.append(number)
    finally:
        model.attach_users(None)
        model.set_rows(Rows())
    return [results[task.key] for task in tasks]
