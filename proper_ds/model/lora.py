"""LoRA for one and for many: a shared adapter, and slots that hold one adapter per row of the batch.

Shapes: R rows, T tokens, D in-features, E out-features, r LoRA rank, S slots, P numbers in one adapter.
The slots' weights, gradients and AdamW moments are flat [S, P] buffers; modules see strided views of them, so that a
user's whole adapter is one row: copied in, out and updated at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from proper_ds.model.config import LoraSettings

Tensor = torch.Tensor

_LAYER = re.compile(r".*\.[^.]*\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The decoder layer that a module's name tells, read as PEFT reads it; None outside of them."""
    match = _LAYER.match(name)
    return int(match.group(1)) if match is not None else None


@dataclass(frozen=True)
class ModuleShape:
    """One adapted linear module."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class LoraLayout:
    """How one adapter lies in a row: for each module in model order A (r x D), then B (E x r)."""

    modules: tuple[ModuleShape, ...]
    r: int
    lora_alpha: float

    @classmethod
    def of(cls, targets: dict[str, nn.Linear], settings: LoraSettings) -> LoraLayout:
        """The layout of `settings` on the modules found by `find_targets`."""
        shapes = (ModuleShape(name, m.in_features, m.out_features) for name, m in targets.items())
        return cls(tuple(shapes), settings.r, settings.lora_alpha)

    @property
    def scaling(self) -> float:
        """`lora_alpha / r`."""
        return self.lora_alpha / self.r

    @property
    def layers(self) -> list[int]:
        """Numbers of the decoder layers that hold adapted modules."""
        return sorted({number for m in self.modules if (number := layer_of(m.name)) is not None})

    @property
    def first_layer(self) -> int:
        """The lowest of `layers`; 0 where modules lie outside of them."""
        return self.layers[0] if all(layer_of(m.name) is not None for m in self.modules) else 0

    @cached_property
    def offsets(self) -> dict[str, tuple[int, int]]:
        """By module: where A and B begin."""
        found, start = {}, 0
        for module in self.modules:
            middle = start + self.r * module.in_features
            found[module.name] = (start, middle)
            start = middle + module.out_features * self.r
        return found

    @cached_property
    def num_parameters(self) -> int:
        """Numbers in one adapter."""
        return sum(self.r * (m.in_features + m.out_features) for m in self.modules)

    def views(self, rows_SP: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(module, A [S, r, D], B [S, E, r]) as views of adapters lying in rows."""
        num = rows_SP.shape[0]
        for m in self.modules:
            a, b = self.offsets[m.name]
            a_SrD = rows_SP[:, a : a + self.r * m.in_features].view(num, self.r, m.in_features)
            b_SEr = rows_SP[:, b : b + m.out_features * self.r].view(num, m.out_features, self.r)
            yield m.name, a_SrD, b_SEr

    def initial_row(self, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A fresh adapter [P]: A Kaiming-uniform with a = sqrt(5), B zero (as PEFT); a function of `seed` alone."""
        generator = torch.Generator().manual_seed(seed)
        row_P = torch.zeros(self.num_parameters, dtype=torch.float32)
        for m in self.modules:
            start, middle = self.offsets[m.name]
            bound = 1 / math.sqrt(m.in_features)
            row_P[start:middle].uniform_(-bound, bound, generator=generator)
        return row_P.to(dtype)

    def with_rank(self, r: int) -> LoraLayout:
        """The same modules and `lora_alpha` at another rank."""
        return LoraLayout(self.modules, r, self.lora_alpha)

    def rank_of(self, num_parameters: int) -> int:
        """The rank of an adapter on these modules that holds so many numbers; raises ValueError where none does."""
        per_rank = sum(m.in_features + m.out_features for m in self.modules)
        if num_parameters < per_rank or num_parameters % per_rank:
            raise ValueError(f"{num_parameters} numbers are no whole rank of {per_rank} numbers")
        return num_parameters // per_rank

    def widened(self, row_P: Tensor, r: int) -> Tensor:
        """An adapter of rank `r` in this layout, whose rank is at least `r`: the same product for every input.

        Unused rows of A and columns of B are zero; B carries the ratio of the scalings `lora_alpha / r`.
        """
        assert r <= self.r, "a layout cannot hold a higher rank"
        if r == self.r:
            return row_P
        wide_P = row_P.new_zeros(self.num_parameters)
        narrow = self.with_rank(r).views(row_P.unsqueeze(0))
        wide = self.views(wide_P.unsqueeze(0))
        for (_, a, b), (_, wide_a, wide_b) in zip(narrow, wide, strict=True):
            wide_a[:, :r] = a
            wide_b[:, :, :r] = b * (self.r / r)
        return wide_P

    def narrowed(self, row_P: Tensor, r: int) -> Tensor:
        """The first `r` ranks of an adapter in this layout, as they are: A's first rows and B's first columns."""
        parts = [part for _, a, b in self.views(row_P.unsqueeze(0)) for part in (a[0, :r], b[0, :, :r])]
        return torch.cat([part.flatten() for part in parts])

    def used_rank(self, row_P: Tensor) -> int:
        """How many ranks of an adapter in this layout are not zero throughout; at least 1."""
        _, a, _ = next(self.views(row_P.unsqueeze(0)))
        return max(1, int(a[0].any(-1).sum()))

    def first_row(self, seed: int, r: int, earlier_P: Tensor | None = None) -> Tensor:
        """Where a user of rank `r` starts, in this layout: a fresh adapter, or an earlier one in its scaling.

        Args:
            earlier_P: an adapter in this layout under this layout's scaling (as `widened` makes them). Ranks that it
                leaves unused start like those of a fresh adapter: from A = B = 0 they could never learn.
        """
        row_P = self.initial_row(seed)
        if earlier_P is None and r == self.r:
            return row_P
        earlier = self.views((torch.zeros_like(row_P) if earlier_P is None else earlier_P.to(row_P)).unsqueeze(0))
        for (_, a, b), (_, old_a, old_b) in zip(self.views(row_P.unsqueeze(0)), earlier, strict=True):
            a[:] = torch.where(old_a.any(-1, keepdim=True), old_a, a)
            b[:] = old_b * (r / self.r)
            a[:, r:], b[:, :, r:] = 0, 0
        return row_P

    def has_effect(self, row_P: Tensor) -> bool:
        """Whether any B of an adapter is not zero."""
        return any(bool(b.any()) for _, _, b in self.views(row_P.unsqueeze(0)))

    def to_json(self) -> dict[str, Any]:
        """For manifests."""
        modules = [[m.name, m.in_features, m.out_features] for m in self.modules]
        return {"modules": modules, "r": self.r, "lora_alpha": self.lora_alpha}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> LoraLayout:
        """The inverse of `to_json`."""
        return cls(tuple(ModuleShape(*m) for m in raw["modules"]), int(raw["r"]), float(raw["lora_alpha"]))


class SharedLora(nn.Module):
    """One LoRA for all rows: `scaling * B A x` (Hu et al. 2021)."""

    def __init__(self, in_features: int, out_features: int, r: int, scaling: float, seed: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        generator = torch.Generator().manual_seed(seed)
        self.lora_A = nn.Parameter(torch.empty(r, in_features).uniform_(-bound, bound, generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r))
        self.scaling = scaling

    def forward(self, x_RTD: Tensor) -> Tensor:
        """The LoRA's addition to the module's output."""
        code_RTr = nn.functional.linear(x_RTD, self.lora_A.to(x_RTD.dtype))
        return nn.functional.linear(code_RTr, self.lora_B.to(x_RTD.dtype)) * self.scaling


class _SlotProduct(torch.autograd.Function):
    """`scaling B[slot] A[slot] x` for every row; adds A's and B's gradients straight into the slots' buffers.

    Plain indexing would make autograd build a gradient as large as all slots for every module and micro-batch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RTD: Tensor,
        anchor: Tensor,
        a_SrD: Tensor,
        b_SEr: Tensor,
        scaling_S: Tensor,
        slot_R: Tensor,
        grads: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        scaling_R11 = scaling_S[slot_R].view(-1, 1, 1)
        a_RrD = a_SrD[slot_R].to(x_RTD.dtype)
        scaled_b_REr = b_SEr[slot_R].mul_(scaling_R11).to(x_RTD.dtype)
        code_RTr = torch.bmm(x_RTD, a_RrD.transpose(1, 2))
        ctx.save_for_backward(x_RTD, code_RTr, a_RrD, scaled_b_REr, scaling_R11, slot_R)
        ctx.grads = grads
        return torch.bmm(code_RTr, scaled_b_REr.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RTD, code_RTr, a_RrD, scaled_b_REr, scaling_R11, slot_R = ctx.saved_tensors
        (grad_RTE,) = grads
        code_grad_RTr = torch.bmm(grad_RTE, scaled_b_REr)
        if ctx.grads is not None:
            a_grad_SrD, b_grad_SEr = ctx.grads
            kind = a_grad_SrD.dtype
            a_grad_SrD.index_add_(0, slot_R, torch.bmm(code_grad_RTr.transpose(1, 2), x_RTD).to(kind))
            b_grad_REr = torch.bmm(grad_RTE.transpose(1, 2), code_RTr).to(kind)
            b_grad_SEr.index_add_(0, slot_R, b_grad_REr.mul_(scaling_R11))
        x_grad = torch.bmm(code_grad_RTr, a_RrD) if ctx.needs_input_grad[0] else None
        return x_grad, None, None, None, None, None, None


class SlotLora(nn.Module):
    """One LoRA per row of the batch, taken from the row's slot. Holds views, no parameters of its own."""

    def __init__(self, a_SrD: Tensor, b_SEr: Tensor, scaling_S: Tensor, grads: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self._a, self._b, self._scaling, self._grads = a_SrD, b_SEr, scaling_S, grads
        # autograd runs the product's backward only if one of its inputs asks for a gradient; x may not
        self._anchor = torch.zeros((), device=a_SrD.device, requires_grad=grads is not None)

    def forward(self, x_RTD: Tensor, slot_R: Tensor) -> Tensor:
        """Each row's own addition to the module's output."""
        out: Tensor = _SlotProduct.apply(x_RTD, self._anchor, self._a, self._b, self._scaling, slot_R, self._grads)
        return out


class SlotBuffers:
    """The flat buffers of S adapters of one layout, and the module views of them.

    Attributes:
        weights_SP: the adapters.
        grads_SP: their gradients, or None where nothing trains.
        scaling_S: `lora_alpha / r` of each; a slot may hold an adapter of a lower rank than the layout's, whose unused
            rows of A and columns of B are zero and stay so: their gradients are zero.
    """

    def __init__(
        self, layout: LoraLayout, num_slots: int, dtype: torch.dtype, device: torch.device | str, trainable: bool
    ) -> None:
        self.layout = layout
        self.weights_SP = torch.zeros(num_slots, layout.num_parameters, dtype=dtype, device=device)
        self.grads_SP = torch.zeros_like(self.weights_SP) if trainable else None
        self.scaling_S = torch.full((num_slots,), layout.scaling, dtype=dtype, device=device)

    @property
    def num_slots(self) -> int:
        """Adapters held."""
        return self.weights_SP.shape[0]

    def modules(self) -> dict[str, SlotLora]:
        """A SlotLora for each module of the layout, all on these buffers."""
        weights = {name: (a, b) for name, a, b in self.layout.views(self.weights_SP)}
        grads = dict.fromkeys(weights)
        if self.grads_SP is not None:
            grads = {name: (a, b) for name, a, b in self.layout.views(self.grads_SP)}
        return {name: SlotLora(a, b, self.scaling_S, grads[name]) for name, (a, b) in weights.items()}
