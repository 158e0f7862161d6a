"""What the engine needs of parameters that are trained apart from DeepSpeed: experts and user tables.

DeepSpeed would average their gradients over all ranks, and shard them over ranks that hold different ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from proper_ds.distributed.checkpoint import Shard

Tensor = torch.Tensor
ReadRows = Callable[[str, int, int], Tensor]
"""(name, start, stop) -> rows of a checkpoint's tensor."""


@dataclass(frozen=True)
class AdamSettings:
    """AdamW's numbers, as in the DeepSpeed file's `optimizer.params`."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float

    @classmethod
    def of(cls, ds_config: dict[str, Any]) -> AdamSettings:
        """From a resolved DeepSpeed configuration."""
        params = ds_config["optimizer"]["params"]
        return cls((params["betas"][0], params["betas"][1]), params["eps"], params["weight_decay"])


class Apart(Protocol):
    """Parameters with an optimizer of their own, whose gradients are summed, not averaged, over ranks."""

    def reduce(self) -> Tensor:
        """Sum the gradients of the step over the ranks that share a parameter; this rank's part of the squared norm.

        A collective. The parts of all ranks add up to the squared norm of all parameters.
        """
        ...

    def step(self, learning_rate: float, factor: float) -> None:
        """Update with the gradients times `factor`, and forget them; a collective."""
        ...

    def drop(self) -> None:
        """Forget the gradients without an update."""
        ...

    def shards(self) -> list[Shard]:
        """Weights and moments that this rank writes to a checkpoint; a collective."""
        ...

    def restore(self, read: ReadRows, num_steps: int) -> None:
        """The inverse of `shards`, for any number of ranks."""
        ...
