"""One gradient norm over what DeepSpeed trains and what is trained apart from it, so that both are clipped alike.

ZeRO's optimizers compute the norm of their own gradients inside `step`; this adds to it there. Used by the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor

_NORMS = ("get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload")
"""Methods of DeepSpeed's ZeRO optimizers (stages 1, 2 and 3) that return the norm of one parameter group."""


class NormHook:
    """Adds a number to the first group norm that a ZeRO optimizer computes in each step.

    `take` after the step asserts that this has happened: a DeepSpeed that computes its norm elsewhere must not pass.
    """

    def __init__(self, optimizer: Any) -> None:
        self._square: Tensor | None = None
        found = [name for name in _NORMS if hasattr(optimizer, name)]
        assert found, f"{type(optimizer).__name__} of this DeepSpeed has no known gradient norm"
        for name in found:
            setattr(optimizer, name, self._adding(getattr(optimizer, name)))

    def _adding(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def norm(*args: Any, **given: Any) -> Any:
            own = inner(*args, **given)
            if self._square is None:
                return own
            square, self._square = self._square, None
            own = torch.as_tensor(own, dtype=torch.float32, device=square.device)
            # an invalid norm is told as -1, which must stay as it is
            return torch.where(own >= 0, (own.square() + square).sqrt(), own)

        return norm

    def give(self, square: Tensor) -> None:
        """The squared norm, over all ranks, of what is trained apart; counts in the next step."""
        self._square = square.float()

    def take(self) -> None:
        """Called after a step."""
        assert self._square is None, "DeepSpeed stepped without asking for the gradient norm"


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients are multiplied with, as in DeepSpeed and torch's `clip_grad_norm_`; 1 where `max_norm` is 0."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
