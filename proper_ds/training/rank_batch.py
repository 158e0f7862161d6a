"""What a rank's forward pass gets: a batch, what its loss is divided by, and what the adapted modules must know.

Built by the rank stages; shapes as in `data/batches.py`, and X texts, which are the rows where none is packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from proper_ds.data.batches import Batch, Step, collate
from proper_ds.data.tokens import Example, TokenData
from proper_ds.files import seed_of
from proper_ds.model.dropout import token_keys
from proper_ds.model.persona import PersonaInputs
from proper_ds.model.routing import Rows

Tensor = torch.Tensor


@dataclass
class RankBatch:
    """One micro-batch of one rank.

    Attributes:
        weight: 0 for the stand-in row of a rank that got no example of a short batch, else 1.
        num_targets, num_rows: of the whole step over all ranks and micro-batches: what losses are divided by.
        features_RF, known_R, block_R: for the user encoder.
        line_R: for the user table.
        persona: for personal tokens.
    """

    batch: Batch
    weight: float
    num_targets: int
    num_rows: int
    rows: Rows = field(default_factory=Rows)
    features_RF: Tensor | None = None
    known_R: Tensor | None = None
    block_R: Tensor | None = None
    line_R: Tensor | None = None
    persona: PersonaInputs | None = None

    @property
    def examples(self) -> Sequence[Example]:
        """The texts."""
        return self.batch.examples


def rank_batch(
    tokens: TokenData, indices: np.ndarray, step: Step, device: torch.device, *, packing: bool = False
) -> RankBatch:
    """The micro-batch of the examples at `indices`; a rank without any gets a row that weighs nothing."""
    examples = tokens.examples(indices) if len(indices) else tokens.examples([0])
    weight = 1.0 if len(indices) else 0.0
    batch = collate(examples, device, packing=packing)
    return RankBatch(batch, weight, step.num_targets, step.num_rows, Rows(text_RT=batch.text_RT))


def example_seed(seed: int, purpose: str, number: int, example: Example) -> int:
    """A seed for this example in this step, the same on whatever rank it lands."""
    return seed_of(seed, purpose, number, example.user, example.kind, example.position)


def dropout_keys(seed: int, number: int, batch: Batch) -> Tensor:
    """Keys for dropout in optimizer step `number`: [R] of rows, or [R, T] of the tokens of packed ones."""
    keys = [example_seed(seed, "dropout", number, example) for example in batch.examples]
    key_X = torch.tensor(keys, dtype=torch.int64, device=batch.ids_RT.device)
    if batch.text_RT is None or batch.place_RT is None:
        return key_X
    return token_keys(key_X[batch.text_RT.clamp_min(0)], batch.place_RT)


def numbers_of(**values: Any) -> dict[str, Tensor]:
    """Scalars to log, detached."""
    return {name: value.detach().float() for name, value in values.items()}
