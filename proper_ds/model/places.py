"""Running the top of the model at target positions only: what no target can see need not be computed.

After the last attention, a token's feed-forward layer reaches that token's own logits only; where those are not asked
for, the work is left out, forward and backward, without any change to the targets. `adapted.py` installs it.
Shapes: R rows, T tokens, K target tokens, W targets of the row that has most, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from proper_ds.model.routing import Rows

Tensor = torch.Tensor


@dataclass(frozen=True)
class Places:
    """Where targets are predicted.

    Attributes:
        row_K, column_K: position of each in the batch; no position twice.
        order_K: how many targets of the same row stand before it.
        width: W.
    """

    row_K: Tensor
    column_K: Tensor
    order_K: Tensor
    width: int

    def run(self, inner: Callable[[Tensor], Tensor], x_RTD: Tensor) -> Tensor:
        """`inner(x)` at the places, zero elsewhere; `inner` works token by token and sees the rows as they are."""
        picked_RWD = x_RTD.new_zeros(x_RTD.shape[0], self.width, x_RTD.shape[-1])
        picked_RWD = picked_RWD.index_put((self.row_K, self.order_K), x_RTD[self.row_K, self.column_K])
        found_KE = inner(picked_RWD)[self.row_K, self.order_K]
        wide_RTE = found_KE.new_zeros(*x_RTD.shape[:2], found_KE.shape[-1])
        return wide_RTE.index_put((self.row_K, self.column_K), found_KE)


def find_top(backbone: nn.Module) -> list[nn.Module]:
    """Modules that work token by token after the last attention, where the base has them under the usual names.

    Only plain gated feed-forward layers: mixtures of experts may answer with more than one tensor.
    """
    layers = getattr(backbone, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return []
    attention, feed_forward = getattr(layers[-1], "self_attn", None), getattr(layers[-1], "mlp", None)
    found = [getattr(attention, "o_proj", None)]
    if isinstance(getattr(feed_forward, "down_proj", None), nn.Module) and not hasattr(feed_forward, "experts"):
        found.append(feed_forward)
    return [module for module in found if isinstance(module, nn.Module)]


def at_places(module: nn.Module, rows: Rows) -> None:
    """Make a module run only where the rows say, if they say so."""
    inner: Callable[..., Any] = module.forward

    def forward(x_RTD: Tensor, *more: Any, **given: Any) -> Any:
        if rows.places is None or more or given:
            return inner(x_RTD, *more, **given)
        return rows.places.run(inner, x_RTD)

    module.forward = forward
