"""AdamW for S adapters lying in rows: each row with its own step counter, learning rate, clipping and moments.

One fused update of stacked tensors; for every row it is torch.optim.AdamW after clip_grad_norm_.
Shapes: S slots, P numbers in one adapter.
"""

from __future__ import annotations

import torch

from proper_ds.training.config import OptimSettings

Tensor = torch.Tensor


class SlotAdamW:
    """AdamW (Loshchilov and Hutter 2019) over the rows of a [S, P] buffer."""

    def __init__(self, weights_SP: Tensor, settings: OptimSettings) -> None:
        self._settings = settings
        self._first_SP = torch.zeros_like(weights_SP)
        self._second_SP = torch.zeros_like(weights_SP)
        self._step_S = torch.zeros(len(weights_SP), dtype=torch.float64)

    def reset(self, slot: int) -> None:
        """Forget everything about a slot: a new user moves in."""
        self._first_SP[slot].zero_()
        self._second_SP[slot].zero_()
        self._step_S[slot] = 0

    def step(self, weights_SP: Tensor, grads_SP: Tensor, active: list[int], rates: list[float]) -> None:
        """Update the `active` rows with their learning `rates`, and zero their gradients."""
        s = self._settings
        rows = torch.tensor(active, device=weights_SP.device)
        kind = weights_SP.dtype
        self._step_S[active] += 1
        step_A = self._step_S[active]

        def column(values_A: Tensor) -> Tensor:
            return values_A.to(weights_SP.device, kind).unsqueeze(1)

        rate_A1 = column(torch.tensor(rates, dtype=torch.float64))
        grads_AP = grads_SP[rows]
        if s.max_grad_norm > 0:
            norm_A1 = torch.linalg.vector_norm(grads_AP, dim=1, keepdim=True)
            grads_AP.mul_((s.max_grad_norm / (norm_A1 + 1e-6)).clamp(max=1.0))
        first_AP = self._first_SP[rows].lerp_(grads_AP, 1 - s.adam_beta1)
        second_AP = self._second_SP[rows].mul_(s.adam_beta2).addcmul_(grads_AP, grads_AP, value=1 - s.adam_beta2)
        weights_AP = weights_SP[rows].mul_(1 - rate_A1 * s.weight_decay)
        correction_1, correction_2 = column(1 - s.adam_beta1**step_A), column((1 - s.adam_beta2**step_A).sqrt())
        denominator_AP = (second_AP.sqrt() / correction_2).add_(s.adam_epsilon)
        weights_AP -= (rate_A1 / correction_1) * (first_AP / denominator_AP)
        weights_SP[rows], self._first_SP[rows], self._second_SP[rows] = weights_AP, first_AP, second_AP
        grads_SP[rows] = 0
