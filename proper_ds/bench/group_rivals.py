"""The rival of `bench group`: the released code's loop over experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from proper_ds.model.experts import ExpertMixture
from proper_ds.model.routing import Rows

Tensor = torch.Tensor


class ExpertLoop(nn.Module):
    """The experts of one module one after another (callanwu/PROPER at 214b35a, peft/tuners/lora.py 387-397).

    Two small linear modules an expert, whose output is scaled by its gate and added up; the gates are those of the
    mixture's own router. Starts from the mixture's weights.
    """

    def __init__(self, mixture: ExpertMixture) -> None:
        super().__init__()
        experts = mixture.experts
        self.router, self._scale = mixture.router, experts.scale
        self.lora_A, self.lora_B = nn.ModuleList(), nn.ModuleList()
        for a_rD, b_Er in zip(experts.lora_A.detach(), experts.lora_B.detach(), strict=True):
            self.lora_A.append(_linear(a_rD))
            self.lora_B.append(_linear(b_Er))

    def forward(self, name: str, x_RTD: Tensor, dropped_RTD: Tensor, user_out_RTE: Tensor | None, rows: Rows) -> Tensor:
        """As `ExpertMixture.forward`."""
        gates_RTN = self.router(x_RTD, user_out_RTE, rows)
        if rows.gates is not None:
            rows.gates.setdefault(name, gates_RTN)
        total: Any = 0
        for number, (a, b) in enumerate(zip(self.lora_A, self.lora_B, strict=True)):
            total = total + b(a(dropped_RTD)) * gates_RTN[..., number : number + 1] * self._scale
        return total

    def experts_parameters(self) -> list[nn.Parameter]:
        """What is trained here besides the mixture's router."""
        return [*self.lora_A.parameters(), *self.lora_B.parameters()]


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    made.weight = nn.Parameter(weight.clone())
    return made
