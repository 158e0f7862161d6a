"""How much each expert was used of late, over all ranks: what the balance term of the group stage holds gates against.

A balance of each micro-batch's own shares would depend on how the global batch is cut into micro-batches and ranks.
Held against the shares of the steps before, the term is a sum over texts, and does not.
Shapes: M modules, N experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from proper_ds.distributed.apart import ReadRows
from proper_ds.distributed.checkpoint import Shard
from proper_ds.distributed.ranks import Ranks

Tensor = torch.Tensor

_DECAY = 0.9
_NAME = "recent_shares"


class RecentShares:
    """A moving mean over the steps, uniform at first; kept in checkpoints as something trained apart (`Apart`).

    Attributes:
        mean_MN: shares over the steps so far.
    """

    def __init__(self, num_modules: int, num_experts: int, ranks: Ranks) -> None:
        self._ranks = ranks
        self.mean_MN = torch.full((num_modules, num_experts), 1 / num_experts, device=ranks.device)
        self._sums = torch.zeros(num_modules * num_experts + 1, device=ranks.device)

    def add(self, shares_MN: Tensor, num_texts: Tensor) -> None:
        """Count the summed mean gates of a micro-batch's texts."""
        self._sums += torch.cat([shares_MN.detach().flatten().float(), num_texts.detach().float().reshape(1)])

    def reduce(self) -> Tensor:
        """See Apart: nothing here has a gradient."""
        if self._ranks.num_ranks > 1:
            dist.all_reduce(self._sums)
        shares_MN = (self._sums[:-1] / self._sums[-1]).view_as(self.mean_MN)
        self.mean_MN = self.mean_MN * _DECAY + shares_MN * (1 - _DECAY)
        self.drop()
        return self._sums.new_zeros(())

    def step(self, learning_rate: float, factor: float) -> None:
        """See Apart; `reduce` has done it."""

    def drop(self) -> None:
        """See Apart."""
        self._sums = torch.zeros_like(self._sums)

    def shards(self) -> list[Shard]:
        """See Apart; the first rank writes."""
        return [Shard(_NAME, self.mean_MN.cpu().clone(), 0, len(self.mean_MN))] if self._ranks.is_first else []

    def restore(self, read: ReadRows, num_steps: int) -> None:
        """See Apart."""
        self.mean_MN = read(_NAME, 0, len(self.mean_MN)).to(self._ranks.device)
