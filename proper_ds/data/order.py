"""The order in which a stage sees its examples, batch after batch; `batches.py` deals the batches to ranks.

It is a function of the seed, the epoch and the size of a global batch, not of who is running; and every rank finds it
for itself, in memory that does not grow with the number of examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from proper_ds.data.indices import Chosen
from proper_ds.files import seed_of

POOL_BATCHES = 50
"""Batches that are cut out of examples sorted by length (as Hugging Face's `group_by_length`)."""
WINDOW_EXAMPLES = 1 << 18
"""Examples that are shuffled as one: what a rank holds of the order, at some tens of bytes each."""


class Blocks(Protocol):
    """Examples in blocks of consecutive ones; see `indices.py`."""

    counts: np.ndarray

    def block(self, number: int) -> Chosen:
        """The examples of a block, ascending."""


class Order:
    """Global batches, epoch after epoch; the last batch of an epoch may be short.

    An epoch's blocks are laid end to end in a random order and cut into windows. A window is shuffled as a whole, cut
    into pools, each sorted by length and cut into batches, and its batches are shuffled again. A set that fits one
    window is so shuffled as a whole; of a larger one each window holds dozens of blocks from everywhere, so that
    examples that stand together, such as one user's, still part. Any batch can be had without those before it.
    """

    def __init__(
        self,
        blocks: Blocks,
        batch_size: int,
        seed: int,
        *,
        by_length: bool = True,
        window_examples: int = WINDOW_EXAMPLES,
    ) -> None:
        """`by_length`: batches of examples of similar length; else pools are cut into batches as they are."""
        self._blocks, self._batch_size, self._seed, self._by_length = blocks, batch_size, seed, by_length
        self._num_examples = int(blocks.counts.sum())
        self._pool = batch_size * POOL_BATCHES
        self._window = max(1, window_examples // self._pool) * self._pool
        self.batches_per_epoch = -(-self._num_examples // batch_size)

    def batches(self, first: int = 0) -> Iterator[Chosen]:
        """The batches from `first` on, counted over all epochs, without end."""
        per_window = self._window // self._batch_size
        epoch, within = divmod(first, self.batches_per_epoch)
        while True:
            for number in range(within // per_window, -(-self.batches_per_epoch // per_window)):
                yield from self._window_batches(epoch, number, max(0, within - number * per_window))
            epoch, within = epoch + 1, 0

    def _window_batches(self, epoch: int, number: int, first: int) -> Iterator[Chosen]:
        held = self._window_examples(epoch, number)
        is_only = self._num_examples <= self._window
        generator = np.random.default_rng(seed_of(self._seed, "epoch", epoch, *([] if is_only else [number])))
        order, batches = generator.permutation(len(held)), []
        for start in range(0, len(order), self._pool):
            part = order[start : start + self._pool]
            if self._by_length:
                part = part[np.argsort(-held.lengths[part], kind="stable")]
            batches += [part[i : i + self._batch_size] for i in range(0, len(part), self._batch_size)]
        for position in generator.permutation(len(batches))[first:]:
            yield held.take(batches[position])

    def _window_examples(self, epoch: int, number: int) -> Chosen:
        """The window's examples, ascending."""
        counts = self._blocks.counts
        order = np.random.default_rng(seed_of(self._seed, "blocks", epoch)).permutation(len(counts))
        ends = np.cumsum(counts[order])
        start = number * self._window
        stop = min(start + self._window, self._num_examples)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        parts = {}
        for block, end in zip(order[first : last + 1].tolist(), ends[first : last + 1].tolist(), strict=True):
            held, begin = self._blocks.block(block), end - int(counts[block])
            if begin < start or end > stop:  # another window has the rest: both take at random, not heads and tails
                generator = np.random.default_rng(seed_of(self._seed, "block", epoch, block))
                shuffled = generator.permutation(len(held))
                held = held.take(np.sort(shuffled[max(0, start - begin) : stop - begin]))
            parts[block] = held
        ascending = [parts[block] for block in sorted(parts)]
        return Chosen(
            np.concatenate([part.indices for part in ascending]),
            np.concatenate([part.lengths for part in ascending]),
            np.concatenate([part.num_targets for part in ascending]),
        )
