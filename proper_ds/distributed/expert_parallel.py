"""Expert parallelism: experts spread over the ranks of a group, copied over the groups; tokens travel to them.

Ranks `g G ... g G + G - 1` are expert group g of size G; the rank at place i in it holds the i-th share of every
module's experts. Ranks at the same place in different groups hold copies, and are each other's replicas.
Used by the group and router stages. Shapes as in `model/experts.py`; Y the most tokens of a rank of the group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from proper_ds.distributed.ranks import Ranks
from proper_ds.model.experts import Chosen, Experts

Tensor = torch.Tensor


@dataclass(frozen=True)
class ExpertGroups:
    """This rank's place in expert parallelism.

    Attributes:
        size: ranks that together hold all experts.
        place: this rank's, from 0.
        group: process group of those ranks; None where there is one.
        num_replicas: ranks that hold what this one holds.
        replica: this rank's number among them.
        replicas: their process group; None where there is one.
    """

    ranks: Ranks
    size: int
    place: int
    group: Any
    num_replicas: int
    replica: int
    replicas: Any

    @classmethod
    def make(cls, ranks: Ranks, size: int) -> ExpertGroups:
        """A collective of all ranks; `size` divides their number."""
        assert ranks.num_ranks % size == 0, "the configuration was checked"
        place, group_number = ranks.rank % size, ranks.rank // size
        num_replicas = ranks.num_ranks // size
        group = replicas = None
        if size > 1:
            made = [dist.new_group(list(range(g * size, (g + 1) * size))) for g in range(num_replicas)]
            group = made[group_number]
        if num_replicas > 1:
            made = [dist.new_group(list(range(p, ranks.num_ranks, size))) for p in range(size)]
            replicas = made[place]
        return cls(ranks, size, place, group, num_replicas, group_number, replicas)

    def share(self, num_experts: int) -> range:
        """The experts that this rank holds; `size` divides their number."""
        assert num_experts % self.size == 0, "the configuration was checked"
        held = num_experts // self.size
        return range(self.place * held, (self.place + 1) * held)


def largest_size(wanted: int, num_ranks: int) -> int:
    """The largest expert-parallel size up to `wanted` that divides it, and the number of ranks that are there."""
    return max(size for size in range(1, wanted + 1) if wanted % size == 0 and num_ranks % size == 0)


class _Gather(torch.autograd.Function):
    """Equal parts of all ranks of a group, one after another; backward adds up and gives each its own part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, groups: ExpertGroups) -> Tensor:
        """[Y, ...] to [G Y, ...]."""
        ctx.groups = groups
        whole = part.new_empty(groups.size * part.shape[0], *part.shape[1:])
        dist.all_gather_into_tensor(whole, part.contiguous(), group=groups.group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The transpose: a reduce-scatter."""
        return _reduced(grads[0], ctx.groups), None


class _Scatter(torch.autograd.Function):
    """Adds up over a group and gives each rank its part; the transpose of `_Gather`."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, groups: ExpertGroups) -> Tensor:
        """[G Y, ...] to [Y, ...]."""
        ctx.groups = groups
        return _reduced(whole, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The transpose: a gather."""
        part, groups = grads[0], ctx.groups
        whole = part.new_empty(groups.size * part.shape[0], *part.shape[1:])
        dist.all_gather_into_tensor(whole, part.contiguous(), group=groups.group)
        return whole, None


def _reduced(whole: Tensor, groups: ExpertGroups) -> Tensor:
    part = whole.new_empty(whole.shape[0] // groups.size, *whole.shape[1:])
    dist.reduce_scatter_tensor(part, whole.contiguous(), group=groups.group)
    return part


class _Swap(torch.autograd.Function):
    """Sends `sent[i]` rows to the rank at place i and receives `received[i]` from it; backward sends them back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], groups: ExpertGroups) -> Tensor:
        """[sum(sent), ...] to [sum(received), ...]."""
        ctx.sent, ctx.received, ctx.groups = sent, received, groups
        return _swapped(rows, sent, received, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The transpose: the same the other way round."""
        return _swapped(grads[0], ctx.received, ctx.sent, ctx.groups), None, None, None


def _swapped(rows: Tensor, sent: list[int], received: list[int], groups: ExpertGroups) -> Tensor:
    found = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(found, rows.contiguous(), received, sent, group=groups.group)
    return found


class TokenExchange:
    """Exchange over the ranks of an expert group; every call is a collective of the group.

    Ranks take part whether they have tokens or not, so none waits for another, and no token is dropped: what each
    sends is counted first.
    """

    def __init__(self, groups: ExpertGroups) -> None:
        self._groups = groups
        self._num_tokens = self._most = 0

    def begin(self, num_tokens: int, device: torch.device) -> None:
        """Called before each micro-batch: this rank's tokens, padding included; one small collective."""
        most = torch.tensor(num_tokens, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self._groups.group)
        self._num_tokens, self._most = num_tokens, int(most)

    def dense(self, experts: Experts, x_XD: Tensor, gates_XN: Tensor) -> Tensor:
        """See Exchange: tokens and gates are gathered, each rank mixes its experts, partial sums are scattered."""
        groups, (num_tokens, width) = self._groups, x_XD.shape
        assert num_tokens == self._num_tokens, "every module sees all tokens of the micro-batch"
        both = torch.cat([x_XD, gates_XN.to(x_XD.dtype)], dim=1)
        both = _Gather.apply(_padded(both, self._most - num_tokens), groups)
        start = width + experts.start
        partial = experts.mixed(both[:, :width], both[:, start : start + experts.num_held])
        found: Tensor = _Scatter.apply(partial, groups)
        return found[:num_tokens]

    def sparse(self, experts: Experts, x_XD: Tensor, chosen: Chosen) -> Tensor:
        """See Exchange: each pair of a token and an expert goes to the expert's rank, and its answer back."""
        num_tokens, top_k = chosen.expert_Xk.shape
        expert_M, gate_M = chosen.expert_Xk.flatten(), chosen.gate_Xk.flatten()
        owner_M = expert_M // experts.num_held
        order_M = torch.argsort(owner_M, stable=True)
        counts = torch.bincount(owner_M, minlength=self._groups.size)
        incoming = torch.empty_like(counts)
        dist.all_to_all_single(incoming, counts, group=self._groups.group)
        sent, received = counts.tolist(), incoming.tolist()
        token_M = order_M // top_k
        both = torch.cat([x_XD[token_M], gate_M[order_M].to(x_XD.dtype).unsqueeze(1)], dim=1)
        both = _Swap.apply(both, sent, received, self._groups)
        numbers = _swapped(expert_M[order_M], sent, received, self._groups) - experts.start
        answers = experts.of_pairs(both[:, :-1], numbers, both[:, -1])
        back_ME = _Swap.apply(answers, received, sent, self._groups)
        found_ME = torch.zeros_like(back_ME).index_copy(0, order_M, back_ME)
        return found_ME.unflatten(0, (num_tokens, top_k)).sum(1)


def _padded(rows: Tensor, num_more: int) -> Tensor:
    """Rows of zeros behind the rest."""
    return torch.nn.functional.pad(rows, (0, 0, 0, num_more)) if num_more else rows
