"""A table of learned user vectors, sharded over all ranks by lines and updated sparsely: for millions of users.

A rank asks the owners for the lines of its micro-batch, and sends their gradients back after the backward pass. Each
line has AdamW moments and a step counter of its own, so a step costs what its lines cost, and a user who is not in a
step is not moved by it (methods.md 7, row 15). Used by the group stage and by PLoRA.
Shapes: L lines asked for, S lines held here, W width of a line, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from proper_ds.distributed.apart import AdamSettings, ReadRows
from proper_ds.distributed.checkpoint import Shard
from proper_ds.distributed.ranks import Ranks
from proper_ds.model.user_vectors import initial_lines

Tensor = torch.Tensor

NAME = "user_table.weight"


@dataclass
class _Lookup:
    """Lines of one micro-batch: which were asked of whom, and the leaf that gathers their gradients."""

    leaf_LW: Tensor
    sent: list[int]
    received: list[int]
    asked: Tensor
    """Lines that other ranks asked of this one."""


class ShardedTable:
    """See the module's docstring; trained apart from DeepSpeed (`Apart`)."""

    def __init__(
        self,
        num_lines: int,
        width: int,
        seed: int,
        ranks: Ranks,
        settings: AdamSettings,
        *,
        spread: float = 1.0,
        rate_ratio: float = 1.0,
    ) -> None:
        """Rank r holds lines `r C` up to `(r + 1) C`, C the lines divided by the ranks, rounded up.

        Args:
            spread: standard deviation of the initial lines.
            rate_ratio: how many times the engine's learning rate the table learns with.
        """
        self._ranks, self._settings, self._num_lines = ranks, settings, num_lines
        self._per_rank = -(-num_lines // ranks.num_ranks)
        start = min(num_lines, ranks.rank * self._per_rank)
        self._held = range(start, min(num_lines, start + self._per_rank))
        self._weight_SW = spread * initial_lines(self._held.start, self._held.stop, width, seed).to(ranks.device)
        self._rate_ratio = rate_ratio
        self._moments = [torch.zeros_like(self._weight_SW) for _ in range(2)]
        self._num_steps_S = torch.zeros(len(self._held), device=ranks.device)
        self._lookups: list[_Lookup] = []
        self._lines = self._grads_LW = torch.empty(0)

    def __call__(self, line_R: Tensor) -> Tensor:
        """Rows [R, W] of lines, with gradients; a collective of all ranks."""
        lines, place_R = torch.unique(line_R, return_inverse=True)
        sent = torch.bincount(lines // self._per_rank, minlength=self._ranks.num_ranks)
        received = self._swap(sent, [1] * len(sent), [1] * len(sent))
        there, here = sent.tolist(), received.tolist()
        asked = self._swap(lines, there, here)
        found_LW = self._swap(self._weight_SW[asked - self._held.start], here, there)
        leaf_LW = found_LW.requires_grad_()
        self._lookups.append(_Lookup(leaf_LW, there, here, asked))
        return leaf_LW[place_R]

    def _swap(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        if self._ranks.num_ranks == 1:
            return rows.clone()
        found = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(found, rows.contiguous(), received, sent)
        return found

    def reduce(self) -> Tensor:
        """See Apart: gradients go to the lines' owners, who add them up."""
        lines, grads = [], []
        for lookup in self._lookups:
            grad_LW = lookup.leaf_LW.grad
            grad_LW = torch.zeros_like(lookup.leaf_LW) if grad_LW is None else grad_LW
            grads.append(self._swap(grad_LW, lookup.sent, lookup.received))
            lines.append(lookup.asked)
        self._lookups = []
        self._lines, place = torch.unique(torch.cat(lines), return_inverse=True)
        summed_LW = self._weight_SW.new_zeros(len(self._lines), self._weight_SW.shape[1])
        self._grads_LW = summed_LW.index_add_(0, place, torch.cat(grads))
        return self._grads_LW.square().sum()

    def step(self, learning_rate: float, factor: float) -> None:
        """See Apart: AdamW on the lines that were asked for."""
        learning_rate = learning_rate * self._rate_ratio
        own, grads_LW, s = self._lines - self._held.start, self._grads_LW * factor, self._settings
        self._num_steps_S[own] += 1
        steps_L1 = self._num_steps_S[own].unsqueeze(1)
        first_LW = self._moments[0][own].lerp(grads_LW, 1 - s.betas[0])
        second_LW = self._moments[1][own] * s.betas[1] + grads_LW.square() * (1 - s.betas[1])
        root_LW = second_LW.sqrt() / (1 - s.betas[1] ** steps_L1).sqrt() + s.eps
        update_LW = first_LW / (1 - s.betas[0] ** steps_L1) / root_LW
        self._weight_SW[own] = self._weight_SW[own] * (1 - learning_rate * s.weight_decay) - learning_rate * update_LW
        self._moments[0][own], self._moments[1][own] = first_LW, second_LW

    def drop(self) -> None:
        """See Apart."""
        self._lookups = []

    def shards(self) -> list[Shard]:
        """See Apart."""
        names = (f"weight/{NAME}", f"exp_avg/{NAME}", f"exp_avg_sq/{NAME}", f"num_steps/{NAME}")
        tensors = (self._weight_SW, *self._moments, self._num_steps_S)
        return [
            Shard(name, tensor.cpu().clone(), self._held.start, self._num_lines)
            for name, tensor in zip(names, tensors, strict=True)
        ]

    def restore(self, read: ReadRows, num_steps: int) -> None:
        """See Apart."""
        start, stop, device = self._held.start, self._held.stop, self._ranks.device
        self._weight_SW = read(f"weight/{NAME}", start, stop).to(device)
        self._moments = [read(f"{kind}/{NAME}", start, stop).to(device) for kind in ("exp_avg", "exp_avg_sq")]
        self._num_steps_S = read(f"num_steps/{NAME}", start, stop).to(device)
