"""From users' steps to rows of tokens: items of one user share the tokens they begin with; pure functions of indices.

A row holds tokens of one user only: a prefix, once, and behind it the rest of each item, which sees the prefix and
itself and none of its siblings. The prefix' gradient is then the sum over the items, as if each had run it alone.
`users.py` makes, packs and runs rows. Shapes: R rows, T tokens, K target tokens, N tokens without padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from proper_ds.data.batches import counts_up, length_batches
from proper_ds.data.tokens import Example
from proper_ds.model.masks import text_mask
from proper_ds.model.places import Places

Tensor = torch.Tensor

PAD, PREFIX, FIRST_ITEM = 0, 1, 2
"""What a token of a row is part of; the row's items count up from FIRST_ITEM."""
_PADDING_PART = 40
"""A micro-batch is closed before its padding exceeds this part of the budget: one more costs about as much."""
_LEAST_WIDTH = 128
LEAST_SAVING = 0.1
"""Share of a step's tokens that sharing must save: attention over a longer row is not free."""


@dataclass(frozen=True)
class Row:
    """Items of one user in one slot that share their first `num_prefix` tokens."""

    slot: int
    num_prefix: int
    examples: tuple[Example, ...]

    @property
    def is_plain(self) -> bool:
        """Whether the row is one item as it is, which needs no mask."""
        return not self.num_prefix and len(self.examples) == 1

    @property
    def num_tokens(self) -> int:
        """Width of the row."""
        return self.num_prefix + sum(len(e.ids) - self.num_prefix for e in self.examples)


def common_prefix(examples: Sequence[Example]) -> int:
    """How many first tokens all examples share; each keeps at least the last token of its own prompt."""
    if len(examples) < 2:
        return 0
    width = min(e.num_prompt for e in examples) - 1
    first = examples[0].ids[:width]
    for example in examples[1:]:
        unequal = np.flatnonzero(first[: len(first)] != example.ids[: len(first)])
        if len(unequal):
            first = first[: unequal[0]]
    return len(first)


def widest_row(num_prefix: int, hidden_size: int) -> int:
    """Tokens up to which a longer row is cheaper than running the prefix once more.

    A row of L tokens costs about `L (6 h + L)` (linear layers, and attention of quadratic cost); the prefix is paid
    once a row. The least cost per item is at `L = P (1 + sqrt(1 + 2 h / P))`, with attention counted three times,
    as measured: its small matrix products run slower. Without a prefix, rows are as wide as attention stays cheap.
    """
    if not num_prefix:
        return max(_LEAST_WIDTH, hidden_size)
    return int(num_prefix * (1 + math.sqrt(1 + 2 * hidden_size / num_prefix)))


def rows_of_step(
    slot: int,
    examples: Sequence[Example],
    prefix_of_task: dict[int, int],
    num_tokens: int,
    hidden_size: int,
    is_sparse: bool = False,
    least_saving: float = LEAST_SAVING,
) -> Iterator[Row]:
    """The rows of one user's step.

    Args:
        prefix_of_task: shared first tokens of the user's items by task; empty where nothing is to be shared.
        num_tokens: no row is wider, but for a single item that is.
        hidden_size: of the base; see `widest_row`.
        is_sparse: few users are at work: put items without a common beginning into one row, too, as there are not
            enough of similar length to fill a batch.
        least_saving: share of the step's tokens that sharing must save.
    """
    by_task: dict[int, list[Example]] = {}
    for example in examples:
        by_task.setdefault(example.task, []).append(example)
    for task, items in by_task.items():
        num_prefix = prefix_of_task.get(task, 0)
        saved = num_prefix * (len(items) - 1)
        if not num_prefix or saved < least_saving * sum(len(e.ids) for e in items):
            num_prefix = 0
            if not is_sparse:
                yield from (Row(slot, 0, (example,)) for example in items)
                continue
        widest = min(num_tokens, widest_row(num_prefix, hidden_size))
        held: list[Example] = []
        width = num_prefix
        for example in items:
            own = len(example.ids) - num_prefix
            if held and width + own > widest:
                yield Row(slot, num_prefix, tuple(held))
                held, width = [], num_prefix
            held.append(example)
            width += own
        yield Row(slot, num_prefix, tuple(held))


def micro_batches(
    rows: Sequence[Row], num_tokens: int, is_kept: Callable[[Row], bool] = lambda row: False
) -> list[list[Row]]:
    """Rows of similar width whose padded size stays within `num_tokens`.

    Rows with a mask and without stay apart, and so do those that `is_kept` tells apart.
    """
    kinds: dict[tuple[bool, bool], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row.is_plain, is_kept(row)), []).append(row)
    found = []
    for _, kind in sorted(kinds.items()):
        for part in length_batches([row.num_tokens for row in kind], num_tokens, num_tokens // _PADDING_PART):
            found.append([kind[i] for i in part])
    return found


@dataclass(frozen=True)
class Packed:
    """Rows as tensors.

    Attributes:
        ids_RT: token ids, padded on the right.
        part_RT: what each token is part of; None where every row is one item.
        position_RT: each token's place in its own item, for rotary embeddings; None as above.
        slot_R: each row's slot.
        places: where each target token is predicted.
        target_K: the target tokens.
        row_N, column_N: position of each token that is not padding, piece by piece: prefix, then items.
    """

    ids_RT: Tensor
    part_RT: Tensor | None
    position_RT: Tensor | None
    slot_R: Tensor
    places: Places
    target_K: Tensor
    row_N: Tensor
    column_N: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return len(self.row_N)

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to attention scores, [R, 1, T, T]: a token sees its prefix, and its own item up to itself."""
        if self.part_RT is None:
            return None
        return text_mask(self.part_RT, dtype, shared=PREFIX)


def pack(rows: Sequence[Row], device: torch.device | str = "cpu") -> Packed:
    """The rows as tensors; all plain, or none."""
    pieces: list[np.ndarray] = []
    about: list[tuple[int, int, int, int, int, int]] = []  # row, part, column, position, prompt tokens of it, targets
    for number, row in enumerate(rows):
        column = row.num_prefix
        if row.num_prefix:
            pieces.append(row.examples[0].ids[: row.num_prefix])
            about.append((number, PREFIX, 0, 0, 0, 0))
        for item, example in enumerate(row.examples):
            pieces.append(example.ids[row.num_prefix :])
            own_prompt = example.num_prompt - row.num_prefix
            about.append((number, FIRST_ITEM + item, column, row.num_prefix, own_prompt, example.num_targets))
            column += len(pieces[-1])
    row_n, part_n, column_n, position_n, prompt_n, targets_n = np.asarray(about, dtype=np.int64).T
    length_n = np.asarray([len(piece) for piece in pieces], dtype=np.int64)
    flat = np.concatenate(pieces)
    within = counts_up(length_n)
    row_at, column_at = np.repeat(row_n, length_n), np.repeat(column_n, length_n) + within
    shape = (len(rows), max(r.num_tokens for r in rows))

    def spread(values: np.ndarray) -> np.ndarray:
        wide = np.zeros(shape, dtype=np.int64)
        wide[row_at, column_at] = values
        return wide

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

    ids = spread(flat)
    target_row = np.repeat(row_n, targets_n)
    target_column = np.repeat(column_n + prompt_n, targets_n) + counts_up(targets_n)
    targets_r = np.bincount(target_row, minlength=len(rows))
    masked = any(not r.is_plain for r in rows)
    return Packed(
        ids_RT=tensor(ids),
        part_RT=tensor(spread(np.repeat(part_n, length_n))) if masked else None,
        position_RT=tensor(spread(np.repeat(position_n, length_n) + within)) if masked else None,
        slot_R=tensor(np.asarray([r.slot for r in rows], dtype=np.int64)),
        places=Places(
            tensor(target_row), tensor(target_column - 1), tensor(counts_up(targets_r)), int(targets_r.max())
        ),
        target_K=tensor(ids[target_row, target_column]),
        row_N=tensor(row_at),
        column_N=tensor(column_at),
    )
