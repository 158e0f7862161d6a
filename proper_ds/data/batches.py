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
        length_R: tokens of each row that are not padding.
        row_K, position_K: where each target token is predicted (one before where it stands).
        target_K: the tokens to be predicted: each text's answer and end token.
        examples: the texts, in order; without packing, the rows.
        text_RT: which of the examples a token belongs to, -1 for padding; None where each row is one text.
        place_RT: each token's place in its own text; None as above.
    """

    ids_RT: Tensor
    length_R: Tensor
    row_K: Tensor
    position_K: Tensor
    target_K: Tensor
    examples: tuple[Example, ...]
    text_RT: Tensor | None = None
    place_RT: Tensor | None = None

    @property
    def mask_RT(self) -> Tensor:
        """True at real tokens."""
        return torch.arange(self.ids_RT.shape[1], device=self.ids_RT.device) < self.length_R[:, None]


def collate(
    examples: Sequence[Example], device: torch.device | str = "cpu", pad_id: int = 0, *, packing: bool = False
) -> Batch:
    """A batch of the examples, as wide as the longest.

    Args:
        packing: put short examples into the room that the longest leaves, several to a row.
    """
    length = np.asarray([len(example.ids) for example in examples], dtype=np.int64)
    num_prompt = np.asarray([example.num_prompt for example in examples], dtype=np.int64)
    rows = first_fit_decreasing(length, int(length.max())) if packing else []
    is_packed = 0 < len(rows) < len(examples)
    if not is_packed:
        rows = [[number] for number in range(len(examples))]
    row, start = np.zeros_like(length), np.zeros_like(length)
    for number, texts in enumerate(rows):
        row[texts], start[texts] = number, np.cumsum([0, *length[texts[:-1]]])
    within, row_at = counts_up(length), np.repeat(row, length)
    column_at = np.repeat(start, length) + within
    shape = (len(rows), int(length.max()))

    def wide(values: np.ndarray, filling: int) -> Tensor:
        found = np.full(shape, filling, dtype=np.int64)
        found[row_at, column_at] = values
        return torch.from_numpy(found).to(device)

    ids_RT = wide(np.concatenate([example.ids for example in examples]), pad_id)
    counts = length - num_prompt
    row_k = torch.from_numpy(np.repeat(row, counts)).to(device)
    column_k = torch.from_numpy(np.repeat(start + num_prompt, counts) + counts_up(counts)).to(device)
    return Batch(
        ids_RT=ids_RT,
        length_R=torch.from_numpy(np.bincount(row, weights=length).astype(np.int64)).to(device),
        row_K=row_k,
        position_K=column_k - 1,
        target_K=ids_RT[row_k, column_k],
        examples=tuple(examples),
        text_RT=wide(np.repeat(np.arange(len(examples)), length), -1) if is_packed else None,
        place_RT=wide(within, 0) if is_packed else None,
    )


def first_fit_decreasing(lengths: Sequence[int] | np.ndarray, width: int) -> list[list[int]]:
    """Positions in rows of at most `width` tokens: the longest first, each into the first row that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for text in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = int(lengths[text])
        row = next((number for number, left in enumerate(room) if length <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(text)
        room[row] -= length
    return rows


def counts_up(lengths: np.ndarray) -> np.ndarray:
    """0, 1, .. for each of the lengths, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


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

    @property
    def largest(self) -> int:
        """Examples of the largest micro-batch of any rank."""
        return max(len(part) for parts in self.micro for part in parts)


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
        by_length: bool = True,
        owner_of: Callable[[np.ndarray], np.ndarray] | None = None,
        num_owners: int = 1,
    ) -> None:
        """Takes the examples to learn from.

        Args:
            per_device: examples of one micro-batch of one rank, at most.
            train_batch_size: examples of one step of all ranks.
            by_length: whether a step's examples are of similar length; see `order.py`.
            owner_of: maps example indices to owners from 0 up to `num_owners`; None where any rank will do.
            num_owners: divides `num_ranks`.
        """
        assert num_ranks % num_owners == 0, "every owner has the same number of ranks"
        self._order = Order(blocks, train_batch_size, seed, by_length=by_length)
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
