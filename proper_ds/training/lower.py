"""States of the frozen layers below the lowest adapted one, computed once a user and kept over its epochs.

`slots.py` asks for them where `lora.layers` leaves the lower layers out. Shapes: R rows, T tokens, N tokens without
padding, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from proper_ds.data.tokens import Example
from proper_ds.model.halves import Halves
from proper_ds.training.rows import Packed, Row, micro_batches

Tensor = torch.Tensor


@dataclass
class _UserStates:
    """By task the shared prefix' states, by item those of the rest; and their size."""

    of_prefix: dict[int, Tensor]
    of_item: dict[int, Tensor]
    num_bytes: int


class LowerStates:
    """The states of the seated users, within a budget of bytes; users beyond it are run from the bottom each time."""

    def __init__(self, halves: Halves, budget_bytes: int, hidden_size: int, dtype: torch.dtype) -> None:
        self.halves = halves
        self._budget_bytes = budget_bytes
        self._token_bytes = hidden_size * dtype.itemsize
        self._users: dict[int, _UserStates] = {}

    def has(self, slot: int) -> bool:
        """Whether the states of the user in this slot are kept."""
        return slot in self._users

    def drop(self, slot: int) -> None:
        """Forget the user of a slot."""
        self._users.pop(slot, None)

    def keep(self, slot: int, rows: Sequence[Row], num_tokens: int, run: Callable[[list[Row]], Tensor]) -> bool:
        """Compute and keep a user's states, if they fit.

        Args:
            rows: all the user's items.
            num_tokens: the budget of a micro-batch.
            run: gives the lower states [R, T, D] of rows, packed.
        """
        num_bytes = sum(row.num_tokens for row in rows) * self._token_bytes
        if num_bytes + sum(user.num_bytes for user in self._users.values()) > self._budget_bytes:
            return False
        user = _UserStates({}, {}, num_bytes)
        for part in micro_batches(rows, num_tokens):
            states_RTD = run(part)
            for row, states_TD in zip(part, states_RTD, strict=True):
                column = row.num_prefix
                if column:
                    user.of_prefix[row.examples[0].task] = states_TD[:column].clone()
                for example in row.examples:
                    stop = column + len(example.ids) - row.num_prefix
                    user.of_item[example.position] = states_TD[column:stop].clone()
                    column = stop
        self._users[slot] = user
        return True

    def gather(self, rows: Sequence[Row], packed: Packed) -> Tensor:
        """The lower states [R, T, D] of packed rows, zero at padding."""
        pieces: list[Tensor] = []
        for row in rows:
            user, task = self._users[row.slot], row.examples[0].task
            if row.num_prefix:
                pieces.append(user.of_prefix[task])
            pieces += [self._of(user, example, row.num_prefix) for example in row.examples]
        flat_ND = torch.cat(pieces)
        states_RTD = flat_ND.new_zeros(*packed.ids_RT.shape, flat_ND.shape[-1])
        states_RTD[packed.row_N, packed.column_N] = flat_ND
        return states_RTD

    def _of(self, user: _UserStates, example: Example, num_prefix: int) -> Tensor:
        """An item's states from its token `num_prefix` on, whatever it was kept without."""
        own = user.of_item[example.position]
        missing = len(example.ids) - num_prefix - len(own)
        assert missing >= 0, "an item kept whole is never asked for without its prefix"
        return torch.cat([user.of_prefix[example.task][-missing:], own]) if missing else own
