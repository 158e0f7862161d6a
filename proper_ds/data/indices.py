"""Which examples a stage learns from, known block by block: nothing here grows with their number but a count a block.

Made by `training/selection.py`, put in order by `order.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from proper_ds.data.tokens import TokenData


@dataclass(frozen=True)
class Chosen:
    """Some examples: their indices, and what batches are made by.

    Attributes:
        lengths: tokens of each, its answer included.
        num_targets: answer tokens of each, end token included.
    """

    indices: np.ndarray
    lengths: np.ndarray
    num_targets: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, positions: np.ndarray) -> Chosen:
        """Those at the positions, in that order."""
        return Chosen(self.indices[positions], self.lengths[positions], self.num_targets[positions])


class Indices:
    """The chosen examples' indices, ascending. Blocks are those of TokenData, and read again whenever asked for.

    Attributes:
        counts: chosen examples of each block.
    """

    def __init__(self, tokens: TokenData, is_chosen: Callable[[int, int], np.ndarray]) -> None:
        """`is_chosen(start, stop)` is a mask over these examples; all blocks are looked at once, to be counted."""
        self._tokens, self._is_chosen = tokens, is_chosen
        self._blocks = list(tokens.blocks())
        self.counts = np.asarray([is_chosen(*block).sum() for block in self._blocks], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def block(self, number: int) -> Chosen:
        """A block's chosen examples."""
        start, stop = self._blocks[number]
        chosen = np.flatnonzero(self._is_chosen(start, stop))
        lengths = self._tokens.column("num_tokens", start, stop)[chosen]
        return Chosen(start + chosen, lengths, lengths - self._tokens.column("num_prompt", start, stop)[chosen])

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The indices at these positions of the ascending list."""
        ends, found = np.cumsum(self.counts), np.empty(len(positions), dtype=np.int64)
        numbers = np.searchsorted(ends, positions, side="right")
        for number in np.unique(numbers):
            here = numbers == number
            first = ends[number] - self.counts[number]
            found[here] = self.block(int(number)).indices[positions[here] - first]
        return found
