"""The group level of one module: N LoRA experts as one fused low-rank product with a scale per token.

Shapes: R rows, T tokens, D in-features, E out-features, N experts, r LoRA rank.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from proper_ds.model.routing import Router, Rows

Tensor = torch.Tensor


class ExpertMixture(nn.Module):
    """`factor * sum_i g_i s B_i A_i x`: the gates scale the codes of the concatenated experts (methods.md 1.10).

    Attributes:
        factor: 1, or 1/N in preset `proper-released` (the released code writes 0.2 and 1/N for N = 5).
        router: user-aware in stage 2 and 3.1; replaced by a LoRA-aware one in stage 3.2.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        r: int,
        scaling: float,
        factor: float,
        router: Router,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        self.lora_A = nn.Parameter(
            torch.empty(num_experts, r, in_features).uniform_(-bound, bound, generator=generator)
        )
        self.lora_B = nn.Parameter(torch.zeros(num_experts, out_features, r))
        self.router = router
        self.scaling, self.factor = scaling, factor

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
            rows.gates.append((name, gates_RTN))
        num_experts, r, width = self.lora_A.shape
        a_ND = self.lora_A.to(x_RTD.dtype).reshape(num_experts * r, width)
        b_EN = self.lora_B.to(x_RTD.dtype).transpose(0, 1).reshape(-1, num_experts * r)
        code_RTN = nn.functional.linear(dropped_RTD, a_ND)
        scaled = code_RTN.unflatten(-1, (num_experts, r)) * gates_RTN.unsqueeze(-1)
        return nn.functional.linear(scaled.flatten(-2), b_EN) * (self.scaling * self.factor)
