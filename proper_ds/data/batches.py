"""Examples to tensors, and the orders in which stages see them; all pure functions of indices, lengths and seeds.

Shapes: R rows, T tokens, K target tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from proper_ds.data.tokens import Example
from proper_ds.files import seed_of

Tensor = torch.Tensor

_POOL_BATCHES = 50


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
    """The order in which ranks see examples: a function of seed and epoch, not of who is running.

    Batches hold examples of similar length (as Hugging Face's `group_by_length`); the last one may be short.
    """

    def __init__(
        self,
        indices: np.ndarray,
        lengths: np.ndarray,
        num_targets: np.ndarray,
        *,
        num_ranks: int,
        per_device: int,
        train_batch_size: int,
        num_epochs: int,
        max_steps: int | None,
        seed: int,
    ) -> None:
        """Takes the example indices to learn from, and for each its length and number of target tokens.

        A step has `train_batch_size` examples, at most `per_device` of them in a rank's micro-batch.
        """
        self._indices, self._lengths, self._num_targets = indices, lengths, num_targets
        self._num_ranks, self._seed = num_ranks, seed
        self.accumulation = -(-train_batch_size // (num_ranks * per_device))
        self._global = train_batch_size
        self.steps_per_epoch = -(-len(indices) // self._global)
        self.num_steps = max_steps if max_steps is not None else self.steps_per_epoch * num_epochs

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        generator = np.random.default_rng(seed_of(self._seed, "epoch", epoch))
        order = generator.permutation(len(self._indices))
        pool = self._global * _POOL_BATCHES
        batches = []
        for start in range(0, len(order), pool):
            part = order[start : start + pool]
            part = part[np.argsort(-self._lengths[part], kind="stable")]
            batches += [part[i : i + self._global] for i in range(0, len(part), self._global)]
        return [batches[i] for i in generator.permutation(len(batches))]

    def steps(self, first: int = 0) -> Iterator[Step]:
        """The steps from `first` on; `first` counts from 0 over all epochs."""
        number = first
        while number < self.num_steps:
            epoch, within = divmod(number, self.steps_per_epoch)
            for batch in self._epoch(epoch)[within:]:
                if number >= self.num_steps:
                    return
                yield self._step(batch)
                number += 1

    def _step(self, batch: np.ndarray) -> Step:
        parts = np.array_split(batch, self._num_ranks * self.accumulation)
        micro = [
            [self._indices[parts[a * self._num_ranks + rank]] for rank in range(self._num_ranks)]
            for a in range(self.accumulation)
        ]
        return Step(micro, int(self._num_targets[batch].sum()), len(batch))
