"""The group level of one module: N LoRA experts as one fused low-rank product with a scale per token.

Every rank may hold all experts or a share of them: what crosses ranks is an `Exchange`, which `distributed/` gives.
Shapes: R rows, T tokens of a row, X tokens, D in-features, E out-features, N experts, n experts held here, k experts
of a token, r LoRA rank, M pairs of a token and one of its experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from proper_ds.model.routing import Router, Rows

Tensor = torch.Tensor

_ALIGNED_BYTES = 16
"""Rows of what `grouped_mm` reads and writes must be multiples of so many bytes."""


@dataclass(frozen=True)
class Chosen:
    """The experts of each token under top-k routing.

    Attributes:
        expert_Xk: their numbers.
        gate_Xk: their gates.
    """

    expert_Xk: Tensor
    gate_Xk: Tensor


def choose(gates_XN: Tensor, top_k: int) -> Chosen:
    """Each token's `top_k` experts. Their gates are made to sum to 1 again, but for k = 1: that would leave the router
    without a gradient (Fedus et al. 2021, section 2.1)."""
    gate_Xk, expert_Xk = gates_XN.topk(top_k, dim=-1)
    if top_k > 1:
        gate_Xk = gate_Xk / gate_Xk.sum(-1, keepdim=True)
    return Chosen(expert_Xk, gate_Xk)


class Experts(nn.Module):
    """The experts of one module, or the share of them from `start` on that a rank holds."""

    def __init__(self, lora_A_nrD: Tensor, out_features: int, scale: float, start: int = 0) -> None:
        """`scale` is `lora_alpha / r`, times 1/N where the preset has it; B starts at zero."""
        super().__init__()
        self.lora_A = nn.Parameter(lora_A_nrD)
        num_experts, r, _ = lora_A_nrD.shape
        self.lora_B = nn.Parameter(torch.zeros(num_experts, out_features, r))
        self.scale, self.start = scale, start

    @property
    def num_held(self) -> int:
        """n."""
        return len(self.lora_A)

    def mixed(self, x_XD: Tensor, gates_Xn: Tensor) -> Tensor:
        """`scale * sum_i g_i B_i A_i x` [X, E] as one product: the gates scale the codes (methods.md 1.10)."""
        num_experts, r, width = self.lora_A.shape
        a_nrD = self.lora_A.to(x_XD.dtype).reshape(num_experts * r, width)
        b_Enr = self.lora_B.to(x_XD.dtype).transpose(0, 1).reshape(-1, num_experts * r)
        code_Xnr = nn.functional.linear(x_XD, a_nrD).unflatten(-1, (num_experts, r))
        return nn.functional.linear((code_Xnr * gates_Xn.unsqueeze(-1)).flatten(-2), b_Enr) * self.scale

    def of_pairs(self, x_MD: Tensor, expert_M: Tensor, gate_M: Tensor) -> Tensor:
        """`scale * g B_e A_e x` [M, E] of pairs, in their order; `expert_M` counts from this share's first."""
        order_M = torch.argsort(expert_M, stable=True)
        counts_n = torch.bincount(expert_M, minlength=self.num_held)
        code_Mr = by_expert(x_MD[order_M], self.lora_A.to(x_MD.dtype).transpose(1, 2), counts_n)
        scaled_Mr = code_Mr * (gate_M[order_M] * self.scale).unsqueeze(-1)
        found_ME = by_expert(scaled_Mr, self.lora_B.to(x_MD.dtype).transpose(1, 2), counts_n)
        return torch.zeros_like(found_ME).index_copy(0, order_M, found_ME)


def by_expert(x_MD: Tensor, weight_nDE: Tensor, counts_n: Tensor) -> Tensor:
    """`x W_e` [M, E] for rows sorted by expert, `counts_n` rows each.

    One grouped product; its operands' rows must be whole multiples of 16 bytes, so narrow ones are padded with zeros.
    It has no fp64 form (which only tests use): there the groups go one by one.
    """
    if x_MD.dtype == torch.float64:
        parts = x_MD.split(counts_n.tolist())
        return torch.cat([part @ weight for part, weight in zip(parts, weight_nDE, strict=True)])
    width = weight_nDE.shape[-1]
    step = _ALIGNED_BYTES // x_MD.element_size()
    add_in, add_out = -x_MD.shape[-1] % step, -width % step
    if add_in or add_out:
        x_MD = nn.functional.pad(x_MD, (0, add_in))
        weight_nDE = nn.functional.pad(weight_nDE, (0, add_out, 0, add_in))
    offsets_n = counts_n.cumsum(0).to(torch.int32)
    found_ME = nn.functional.grouped_mm(x_MD.contiguous(), weight_nDE, offs=offsets_n)
    return found_ME[:, :width]


class Exchange(Protocol):
    """Lets tokens meet experts that other ranks hold; see `distributed/expert_parallel.py`."""

    def dense(self, experts: Experts, x_XD: Tensor, gates_XN: Tensor) -> Tensor:
        """The mixture [X, E] of all experts."""
        ...

    def sparse(self, experts: Experts, x_XD: Tensor, chosen: Chosen) -> Tensor:
        """The sum [X, E] over each token's chosen experts."""
        ...


class NoExchange:
    """All the experts that a token may need are held here."""

    def dense(self, experts: Experts, x_XD: Tensor, gates_XN: Tensor) -> Tensor:
        """See Exchange; gates of experts held elsewhere must be zero."""
        return experts.mixed(x_XD, gates_XN[:, experts.start : experts.start + experts.num_held])

    def sparse(self, experts: Experts, x_XD: Tensor, chosen: Chosen) -> Tensor:
        """See Exchange."""
        num_tokens, top_k = chosen.expert_Xk.shape
        token_M = torch.arange(num_tokens, device=x_XD.device).repeat_interleave(top_k)
        found_ME = experts.of_pairs(x_XD[token_M], chosen.expert_Xk.flatten(), chosen.gate_Xk.flatten())
        return found_ME.unflatten(0, (num_tokens, top_k)).sum(1)


class ExpertMixture(nn.Module):
    """`scale * sum_i g_i B_i A_i x` over all experts, or over each token's `top_k`.

    Attributes:
        router: user-aware in stage 2 and 3.1; replaced by a LoRA-aware one in stage 3.2.
        exchange: how tokens meet the experts.
    """

    def __init__(self, experts: Experts, router: Router, top_k: int | None) -> None:
        super().__init__()
        # Not a submodule: experts belong to the level, which may train them apart from the rest of the model.
        self._experts = (experts,)
        self.router = router
        self.top_k = top_k
        self.exchange: Exchange = NoExchange()

    @property
    def experts(self) -> Experts:
        """The experts held here."""
        return self._experts[0]

    def forward(self, name: str, x_RTD: Tensor, dropped_RTD: Tensor, user_out_RTE: Tensor | None, rows: Rows) -> Tensor:
        """The experts' addition to the module's output.

        Args:
            name: the module's name, under which gates are recorded.
            x_RTD: the module's input, for the router.
            dropped_RTD: the same after dropout, for the experts (one mask for all of them).
            user_out_RTE: the output of the row's own LoRA, or None.
        """
        gates_RTN = self.router(x_RTD, user_out_RTE, rows)
        if rows.gates is not None:
            rows.gates.setdefault(name, gates_RTN)  # under gradient checkpointing a module runs twice
        x_XD, gates_XN = dropped_RTD.flatten(0, 1), gates_RTN.flatten(0, 1)
        if self.top_k is None:
            found_XE = self.exchange.dense(self.experts, x_XD, gates_XN)
        else:
            found_XE = self.exchange.sparse(self.experts, x_XD, choose(gates_XN, self.top_k))
        return found_XE.unflatten(0, x_RTD.shape[:2])


def fresh_lora_A(num_experts: int, r: int, in_features: int, generator: torch.Generator) -> Tensor:
    """Kaiming-uniform with a = sqrt(5), [N, r, D]."""
    bound = 1 / math.sqrt(in_features)
    return torch.empty(num_experts, r, in_features).uniform_(-bound, bound, generator=generator)
