"""AdamW for S adapters lying in rows: each row with its own step counter, learning rate, clipping and moments.

One update of stacked tensors; for every row it is torch.optim.AdamW after clip_grad_norm_.
Shapes: S slots, B slots of one block, P numbers in one adapter.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from proper_ds.training.config import OptimSettings

Tensor = torch.Tensor

_CACHE_BYTES = 256 << 10
"""On CPUs, rows are updated in blocks whose weights, gradients and moments stay in the core's cache over all passes."""


class SlotAdamW:
    """AdamW (Loshchilov and Hutter 2019) over the rows of a [S, P] buffer, in place."""

    def __init__(
        self, weights_SP: Tensor, grads_SP: Tensor, settings: OptimSettings, factor_P: Tensor | None = None
    ) -> None:
        """`factor_P` multiplies the learning rate of each number of every adapter; weight decay keeps to the rate."""
        self._settings, self._factor_P = settings, factor_P
        self._weights_SP, self._grads_SP = weights_SP, grads_SP
        self._first_SP = torch.zeros_like(weights_SP)
        self._second_SP = torch.zeros_like(weights_SP)
        self._num_steps = [0] * len(weights_SP)
        row_bytes = max(1, 4 * weights_SP.shape[1] * weights_SP.element_size())
        on_cpu = weights_SP.device.type == "cpu"
        self._block = max(1, _CACHE_BYTES // row_bytes) if on_cpu else len(weights_SP)

    def reset(self, slot: int) -> None:
        """Forget everything about a slot: a new user moves in."""
        for rows_SP in (self._grads_SP, self._first_SP, self._second_SP):
            rows_SP[slot].zero_()
        self._num_steps[slot] = 0

    def step(self, rates: Mapping[int, float]) -> None:
        """Update the given slots with their learning rates; all gradients are zero afterwards.

        Slots that are not given hold no user: their rows may change, and mean nothing until the next `reset`.
        """
        for slot in rates:
            self._num_steps[slot] += 1
        s, num_slots = self._settings, len(self._weights_SP)
        correction_1 = [1 - s.adam_beta1 ** max(1, steps) for steps in self._num_steps]
        correction_2 = [(1 - s.adam_beta2 ** max(1, steps)) ** 0.5 for steps in self._num_steps]
        rate = [rates.get(slot, 0.0) for slot in range(num_slots)]
        columns = [
            [1 - r * s.weight_decay for r in rate],
            [-r / c for r, c in zip(rate, correction_1, strict=True)],
            correction_2,
        ]
        column_3S1 = torch.tensor(columns, dtype=torch.float64).unsqueeze(-1)
        column_3S1 = column_3S1.to(self._weights_SP.device, self._weights_SP.dtype, non_blocking=True)
        for start in range(0, num_slots, self._block):
            block = slice(start, min(start + self._block, num_slots))
            if any(slot in rates for slot in range(block.start, block.stop)):
                self._update(block, *column_3S1[:, block])

    def _update(self, block: slice, decay_B1: Tensor, rate_B1: Tensor, correction_B1: Tensor) -> None:
        s = self._settings
        grads_BP, first_BP, second_BP = self._grads_SP[block], self._first_SP[block], self._second_SP[block]
        if s.max_grad_norm > 0:
            norm_B1 = torch.linalg.vector_norm(grads_BP, dim=1, keepdim=True)
            grads_BP.mul_((s.max_grad_norm / (norm_B1 + 1e-6)).clamp(max=1.0))
        first_BP.lerp_(grads_BP, 1 - s.adam_beta1)
        second_BP.mul_(s.adam_beta2).addcmul_(grads_BP, grads_BP, value=1 - s.adam_beta2)
        denominator_BP = second_BP.sqrt().div_(correction_B1).add_(s.adam_epsilon)
        update_BP = torch.div(first_BP, denominator_BP)
        if self._factor_P is not None:
            update_BP.mul_(self._factor_P)
        self._weights_SP[block].mul_(decay_B1).addcmul_(update_BP, rate_B1)
        grads_BP.zero_()
