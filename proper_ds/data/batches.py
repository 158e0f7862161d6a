"""Examples to tensors, and which rank sees which; all pure functions of indices, lengths and seeds.

Shapes: R rows, T tokens, K target tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from proper_ds.data.order import Blocks, Order
from proper_ds.data.tokens import Example

Tensor = torch.Tensor


@dataclass(frozen=True)
class Batch:
    """Right-padded rows and where their targets are.

    Attributes:
        row_K, position_K: where each target token is predicted (one before where it stands).
        target_K: the tokens to be predicted: each row's answer and end token.
        examples: the rows' examples, in order.
    """

    ids_RT: Tensor
    length_R: Tensor
    row_K: Tensor
    position_K: Tensor
    target_K: Tensor
    examples: tuple[Example, ...]

    @property
    def mask_RT(self) -> Tensor:
        """True at real tokens."""
        return torch.arange(self.ids_RT.shape[1], device=self.ids_RT.device) < self.length_R[:, None]


def collate(examples: Sequence[Example], device: torch.device | str = "cpu", pad_id: int = 0) -> Batch:
    """A batch of the examples, as wide as the longest."""
    length = np.asarray([len(example.ids) for example in examples], dtype=np.int64)
    num_prompt = np.asarray([example.num_prompt for example in examples], dtype=np.int64)
    ids = np.full((len(examples), int(length.max())), pad_id, dtype=np.int64)
    for number, example in enumerate(examples):
        ids[number, : len(example.ids)] = example.ids
    counts = length - num_prompt
    row = np.repeat(np.arange(len(examples)), counts)
    starts = np.repeat(num_prompt - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
    position = np.arange(counts.sum()) + starts

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return Batch(
        ids_RT=tensor(ids),
        length_R=tensor(length),
        row_K=tensor(row),
        position_K=tensor(position - 1),
        target_K=tensor(ids[row, position]),
        examples=tuple(examples),
    )


def length_batches(lengths: Sequence[int], num_tokens: int, max_padding: int | None = None) -> list[list[int]]:
    """Cut positions into batches of similar length whose padded size stays within `num_tokens`; longest first.

    A single example longer than the budget gets a batch of its own.

    Args:
        max_padding: close a batch, too, before it holds more tokens of padding; None for no limit.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    width = padding = 0
    for index in order:
        padding += width - lengths[index]
        fits = batches and (len(batches[-1]) + 1) * width <= num_tokens
        if fits and (max_padding is None or padding <= max_padding):
            batches[-1].append(index)
        else:
            batches.append([index])
            width, padding = lengths[index], 0
    return batches


@dataclass(frozen=True)
class Step:
    """One optimizer step of all ranks together.

    Attributes:
        micro: [accumulation][rank] -> example indices; a rank may have none.
        num_targets: target tokens of the whole step.
        num_rows: examples of the whole step.
    """

    micro: list[list[np.ndarray]]
    num_targets: int
    num_rows: int


class StepPlan:
    """Which rank sees which examples in which step.

    A step's examples depend on seed, epoch and `train_batch_size` only (`order.py`). All ranks run the same number of
    micro-batches in every step, as DeepSpeed asks for, and their parts of a micro-batch differ by one example at most.

    With `owner_of`, an example goes to a rank whose number leaves the example's owner when divided by `num_owners`: a
    step's examples of one owner are shared by that owner's ranks alone. Micro-batches then hold as many examples as
    their owner has in the step, more or fewer than `per_device`, and their number stays.
    """

    def __init__(
        self,
        blocks: Blocks,
        *,
        num_ranks: int,
        per_device: int,
        train_batch_size: int,
        num_epochs: int,
        max_steps: int | None,
        seed: int,
        owner_of: Callable[[np.ndarray], np.ndarray] | None = None,
        num_owners: int = 1,
    ) -> None:
        """Takes the examples to learn from.

        Args:
            per_device: examples of one micro-batch of one rank, at most.
            train_batch_size: examples of one step of all ranks.
            owner_of: maps example indices to owners from 0 up to `num_owners`; None where any rank will do.
            num_owners: divides `num_ranks`.
        """
        assert num_ranks % num_owners == 0, "every owner has the same number of ranks"
        self._order = Order(blocks, train_batch_size, seed)
        self._num_ranks, self._num_owners, self._owner_of = num_ranks, num_owners, owner_of
        self.accumulation = num_micro_batches(train_batch_size, num_ranks, per_device)
        self.steps_per_epoch = self._order.batches_per_epoch
        self.num_steps = max_steps if max_steps is not None else self.steps_per_epoch * num_epochs

    def steps(self, first: int = 0) -> Iterator[Step]:
        """The steps from `first` on; `first` counts from 0 over all epochs."""
        for batch in islice(self._order.batches(first), max(0, self.num_steps - first)):
            yield Step(self._dealt(batch.indices), int(batch.num_targets.sum()), len(batch))

    def _dealt(self, indices: np.ndarray) -> list[list[np.ndarray]]:
        micro = [[indices[:0]] * self._num_ranks for _ in range(self.accumulation)]
        owners = np.zeros(len(indices), dtype=np.int64) if self._owner_of is None else self._owner_of(indices)
        num_owners = 1 if self._owner_of is None else self._num_owners
        for owner in range(num_owners):
            ranks = range(owner, self._num_ranks, num_owners)
            parts = np.array_split(indices[owners == owner], len(ranks) * self.accumulation)
            for number, part in enumerate(parts):
                micro[number // len(ranks)][ranks[number % len(ranks)]] = part
        return micro


def num_micro_batches(train_batch_size: int, num_ranks: int, per_device: int) -> int:
    """Micro-batches of each rank in one step."""
    return -(-train_batch_size // (num_ranks * per_device))
