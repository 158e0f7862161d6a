"""Root-mean-square norms in a third of the passes over memory; put in place where they equal the model's own.

A frozen norm needs no gradient for its weight, and its backward pass has a closed form: what remains is bound by
memory, and autograd's dozen small operations are what a small model waits for. `users.py` switches them on.
Shapes: D features, any leading ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor


class _RmsNorm(torch.autograd.Function):
    """`weight * x / sqrt(mean(x^2) + eps)`, the norm in fp32 (Zhang and Sennrich 2019)."""

    @staticmethod
    def forward(ctx: Any, x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        exact_D = x_D.float()
        length = torch.linalg.vector_norm(exact_D, dim=-1, keepdim=True)
        rate = (length.square() / x_D.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x_D, weight_D, rate)
        return (exact_D * rate).to(x_D.dtype).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_D, weight_D, rate = ctx.saved_tensors
        grad_D, exact_D = (grads[0] * weight_D).float(), x_D.float()
        along = torch.linalg.vecdot(grad_D, exact_D).unsqueeze(-1) * rate.pow(3) / -x_D.shape[-1]
        return grad_D.mul_(rate).addcmul_(exact_D, along).to(x_D.dtype), None, None


def _eps_of(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a frozen norm of this kind in fp32 or bf16; decided by its answers, not by its name."""
    weight, eps = getattr(module, "weight", None), _eps_of(module)
    if "rmsnorm" not in type(module).__name__.lower() or eps is None or not isinstance(weight, nn.Parameter):
        return False
    if weight.dim() != 1 or weight.requires_grad or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    width = len(weight)
    probe = torch.linspace(-3, 2, 3 * width, device=weight.device).view(1, 3, width).to(weight.dtype)
    close = 1e-5 if weight.dtype is torch.float32 else 1e-2  # bf16: one in some hundred numbers rounds the other way
    with torch.no_grad():
        return torch.allclose(module(probe), _RmsNorm.apply(probe, weight, eps), rtol=close, atol=close)


@contextmanager
def fused_norms(lm: nn.Module) -> Iterator[int]:
    """Replace the norms that can be while the block runs; gives their number."""
    found = [module for module in lm.modules() if "forward" not in vars(module) and _is_plain(module)]
    for module in found:
        weight, eps = module.weight, _eps_of(module)

        def forward(x_D: Tensor, weight: Any = weight, eps: Any = eps) -> Tensor:
            out: Tensor = _RmsNorm.apply(x_D, weight, eps)
            return out

        module.forward = forward
    try:
        yield len(found)
    finally:
        for module in found:
            del module.forward
