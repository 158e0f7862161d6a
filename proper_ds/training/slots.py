"""Slots of user adapters on one device: who sits where, and one optimizer step of all of them together.

`users.py` seats users and takes their adapters away; rows of tokens come from `rows.py`. Shapes: R rows, T tokens,
K target tokens, S slots, P numbers in one adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from proper_ds.data.tokens import Example
from proper_ds.files import seed_of
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.dropout import token_keys
from proper_ds.model.lora import LoraLayout, SlotBuffers
from proper_ds.model.routing import Rows
from proper_ds.model.user_start import UserStart
from proper_ds.training.config import UserConfig
from proper_ds.training.lower import LowerStates
from proper_ds.training.optim import SlotAdamW
from proper_ds.training.rows import FIRST_ITEM, Packed, Row, common_prefix, micro_batches, pack, rows_of_step
from proper_ds.training.schedule import learning_rate

Tensor = torch.Tensor


@dataclass(frozen=True)
class UserTask:
    """One user to be trained.

    Attributes:
        key: the user's key; with the run's seed it decides the initial adapter and the order of items.
        examples: the history as training pairs, oldest first.
        user_vector_U: for routers; None without groups.
        initial_row_P: an earlier adapter to go on from, in the run's widest layout; None starts a fresh one.
    """

    key: str
    examples: list[Example]
    user_vector_U: Tensor | None = None
    initial_row_P: Tensor | None = None


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


class Sitter:
    """A user in a slot: how far it has come, and what it learns next.

    Attributes:
        losses: mean loss per target token in each step that has been read back from the device.
        num_steps: optimizer steps to make in all.
        r: rank of the user's LoRA.
    """

    def __init__(self, task: UserTask, settings: UserConfig, seed: int) -> None:
        self.task = task
        self.seed = seed_of(seed, "user", task.key)
        self.r = settings.rank_of(len(task.examples))
        self.num_steps = num_user_steps(len(task.examples), settings)
        self.step = 0
        self.losses: list[float] = []
        self.num_targets = 0
        per_step = settings.per_device_train_batch_size
        self.steps_per_epoch = math.ceil(len(task.examples) / per_step)
        self._order = item_order(len(task.examples), self.num_steps, per_step, self.seed)
        self._examples: list[Example] = []
        self._prefix_of_task: dict[int, int] = {}
        if settings.share_prefix:
            for kind in {e.task for e in task.examples}:
                self._prefix_of_task[kind] = common_prefix([e for e in task.examples if e.task == kind])

    def begin_step(self) -> int:
        """Draw the examples of this user's next step; gives their tokens."""
        self._examples = [self.task.examples[i] for i in next(self._order)]
        self.num_targets = sum(e.num_targets for e in self._examples)
        return sum(len(e.ids) for e in self._examples)

    def rows(self, slot: int, num_tokens: int, hidden_size: int, is_sparse: bool) -> list[Row]:
        """The rows of the step that was begun."""
        return list(rows_of_step(slot, self._examples, self._prefix_of_task, num_tokens, hidden_size, is_sparse))

    def all_rows(self, slot: int, num_tokens: int, hidden_size: int) -> list[Row]:
        """Rows of the whole history; whatever a step may share is shared."""
        prefixes = self._prefix_of_task
        return list(rows_of_step(slot, self.task.examples, prefixes, num_tokens, hidden_size, least_saving=0.0))

    def dropout_keys(self, row: Row) -> list[int]:
        """Keys of the row's prefix and items: the same whatever else is in the batch."""
        prefix = seed_of(self.seed, self.step, "prefix", row.examples[0].task)
        return [prefix] + [seed_of(self.seed, self.step, example.position) for example in row.examples]

    def wants_to_stop(self, patience: int | None, threshold: float) -> bool:
        """Whether the epochs' losses stopped falling: none of the last `patience` was lower by the threshold."""
        if patience is None or self.step % self.steps_per_epoch:
            return False
        epochs = np.asarray(self.losses).reshape(-1, self.steps_per_epoch).mean(1)
        best, stale = math.inf, 0
        for loss in epochs:
            stale = 0 if loss < best - threshold else stale + 1
            best = min(best, loss)
        return stale >= patience


class SlotPool:
    """The slots' buffers and optimizer.

    Attributes:
        sitting: the user in each slot that is taken.
        num_real, num_padded: tokens run in the last tick, without and with padding.
    """

    def __init__(
        self,
        model: PersonalModel,
        layout: LoraLayout,
        settings: UserConfig,
        seed: int,
        num: int,
        start: UserStart | None = None,
    ) -> None:
        self.model, self.layout, self.settings, self.seed, self.start = model, layout, settings, seed, start
        dtype = torch.float64 if model.lm.dtype == torch.float64 else torch.float32
        self.buffers = SlotBuffers(layout, num, dtype, model.device, trainable=True)
        assert self.buffers.grads_SP is not None
        factor_P = start.factor_P.to(model.device, dtype) if start is not None else None
        self.optimizer = SlotAdamW(self.buffers.weights_SP, self.buffers.grads_SP, settings, factor_P)
        self.sitting: dict[int, Sitter] = {}
        self.num_real = self.num_padded = 0
        self.unread: list[tuple[dict[int, Sitter], Tensor]] = []
        self._hidden_size = int(model.lm.config.hidden_size)
        model.attach_users(self.buffers.modules(), settings.lora.lora_dropout)
        self._lower = self._lower_states()

    def seat(self, number: int, task: UserTask) -> None:
        """Give a slot to a user: its first adapter, fresh moments."""
        sitter = Sitter(task, self.settings, self.seed)
        if task.initial_row_P is not None:  # a shorter history is no reason to cut off what was learned
            sitter.r = max(sitter.r, self.layout.used_rank(task.initial_row_P))
        weights_SP = self.buffers.weights_SP
        if self.start is None:
            row_P = self.layout.first_row(sitter.seed, sitter.r, task.initial_row_P)
        else:
            row_P = self.start.row_P
        weights_SP[number] = row_P.to(weights_SP.device, weights_SP.dtype)
        self.buffers.scaling_S[number] = self.layout.lora_alpha / sitter.r
        self.optimizer.reset(number)
        self.sitting[number] = sitter
        self._keep_lower(number, sitter)

    def tick(self) -> None:
        """One optimizer step of every user; losses stay on the device until `read`."""
        budget = self.settings.num_tokens_per_batch
        num_tokens = sum([sitter.begin_step() for sitter in self.sitting.values()])
        is_sparse = self.settings.share_prefix and num_tokens <= budget
        rows = [r for n, s in self.sitting.items() for r in s.rows(n, budget, self._hidden_size, is_sparse)]
        self.num_real = self.num_padded = 0
        loss_S = torch.zeros(self.buffers.num_slots, dtype=torch.float64, device=self.model.device)
        weights = [1 / self.sitting[n].num_targets if n in self.sitting else 0.0 for n in range(len(loss_S))]
        weight_S = torch.tensor(weights, dtype=torch.float64).to(loss_S.device, non_blocking=True)
        for part in micro_batches(rows, budget, self._is_kept):
            self._accumulate(part, weight_S, loss_S)
        self.optimizer.step({n: learning_rate(self.settings, s.step, s.num_steps) for n, s in self.sitting.items()})
        self.unread.append((dict(self.sitting), loss_S))
        for sitter in self.sitting.values():
            sitter.step += 1

    def read(self) -> None:
        """Bring the losses of the ticks since the last call to their users."""
        if self.unread:
            found = torch.stack([loss_S for _, loss_S in self.unread]).tolist()
            for (sitting, _), losses in zip(self.unread, found, strict=True):
                for number, sitter in sitting.items():
                    sitter.losses.append(losses[number])
            self.unread = []

    def take(self, number: int) -> tuple[Sitter, Tensor]:
        """Free a slot: its user, and the user's adapter [P] of the user's own rank on the CPU."""
        sitter = self.sitting.pop(number)
        if self._lower is not None:
            self._lower.drop(number)
        row_P = self.buffers.weights_SP[number].detach().cpu()
        if self.start is not None:
            row_P = self.start.shrunk(row_P, len(sitter.task.examples))
        return sitter, self.layout.narrowed(row_P, sitter.r)

    def _accumulate(self, rows: list[Row], weight_S: Tensor, loss_S: Tensor) -> None:
        """Add the gradients of some rows to their slots; each user's loss is a mean over its own step's targets."""
        model = self.model
        packed = pack(rows, model.device)
        self.num_real += packed.num_tokens
        self.num_padded += packed.ids_RT.numel()
        model.set_rows(self._rows(packed, rows))
        mask_R1TT, at = packed.mask(model.lm.dtype), packed.places
        if self._lower is not None and self._is_kept(rows[0]):
            kept_RTD = self._lower.gather(rows, packed)
            states_RTD = self._lower.halves.upper(kept_RTD, packed.position_RT, mask_R1TT)
        else:
            states_RTD = model.hidden(packed.ids_RT, packed.position_RT, mask_R1TT)
        losses_K = model.losses_at(states_RTD, at.row_K, at.column_K, packed.target_K)
        slot_K = packed.slot_R[at.row_K]
        weighted_K = losses_K * weight_S[slot_K].to(losses_K.dtype)
        loss_S.index_add_(0, slot_K, weighted_K.detach().double())
        weighted_K.sum().backward()

    def _is_kept(self, row: Row) -> bool:
        return self._lower is not None and self._lower.has(row.slot)

    def _lower_states(self) -> LowerStates | None:
        """Keeps the states of layers that never change; None where there are none, or some drop out."""
        first = self.layout.first_layer
        if not self.settings.lora.layers or not first or not self.settings.cache_bytes or self.model.has_dropout:
            return None
        halves = self.model.halves(first)
        return LowerStates(halves, self.settings.cache_bytes, self._hidden_size, self.model.lm.dtype)

    def _keep_lower(self, number: int, sitter: Sitter) -> None:
        if self._lower is None or sitter.num_steps == sitter.steps_per_epoch:
            return  # what is asked for once is not worth keeping
        lower, budget = self._lower, self.settings.num_tokens_per_batch

        def run(rows: list[Row]) -> Tensor:
            packed = pack(rows, self.model.device)
            self.model.set_rows(self._rows(packed, rows))
            mask_R1TT = packed.mask(self.model.lm.dtype)
            return lower.halves.lower(packed.ids_RT, packed.position_RT, mask_R1TT)

        lower.keep(number, sitter.all_rows(number, budget, self._hidden_size), budget, run)

    def _rows(self, packed: Packed, rows: list[Row]) -> Rows:
        device, found = self.model.device, Rows(packed.slot_R)
        sitters = [self.sitting[row.slot] for row in rows]
        vectors = [s.task.user_vector_U for s in sitters if s.task.user_vector_U is not None]
        if vectors:
            assert len(vectors) == len(rows), "either every user has a vector or none"
            found.user_RU = torch.stack(vectors).to(device)
        if self.model.has_dropout:
            keys = [sitter.dropout_keys(row) for sitter, row in zip(sitters, rows, strict=True)]
            found.key_R = _keys(packed, keys).to(device)
        else:
            found.places = packed.places
        return found


def _keys(packed: Packed, keys: list[list[int]]) -> Tensor:
    """Dropout keys of rows [R], or of each token [R, T] where rows have several parts."""
    if packed.part_RT is None or packed.position_RT is None:
        return torch.tensor([own[1] for own in keys], dtype=torch.int64)
    part_RT, position_RT = packed.part_RT.cpu(), packed.position_RT.cpu()
    width = max(len(own) for own in keys)
    key_RI = torch.tensor([own + [0] * (width - len(own)) for own in keys], dtype=torch.int64)
    key_RT = key_RI.gather(1, (part_RT - FIRST_ITEM + 1).clamp_min(0))
    return token_keys(key_RT, position_RT)
