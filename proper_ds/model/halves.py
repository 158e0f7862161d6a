"""A decoder cut in two: the layers below the lowest adapted one, whose states never change, and the rest.

`training/lower.py` keeps the lower half's states over a user's epochs. Shapes: R rows, T tokens, D features.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from proper_ds.errors import AdapterError

Tensor = torch.Tensor


class Halves:
    """Two views of one backbone that share its modules."""

    def __init__(self, backbone: nn.Module, first_layer: int) -> None:
        """Cut before layer `first_layer`.

        Raises:
            AdapterError: where the parts have other names, or running one after the other does not give the whole.
        """
        layers, norm = getattr(backbone, "layers", None), getattr(backbone, "norm", None)
        if not isinstance(layers, nn.ModuleList) or not isinstance(norm, nn.Module):
            raise AdapterError(_refusal(backbone, "it has no `layers` followed by a `norm`"))
        self._lower = _view(backbone, slice(0, first_layer))
        self._lower.norm = nn.Identity()
        self._upper = _view(backbone, slice(first_layer, len(layers)))

    def lower(self, ids_RT: Tensor, position_RT: Tensor | None, mask_R1TT: Tensor | None) -> Tensor:
        """States [R, T, D] below the cut."""
        with torch.no_grad():
            found: Tensor = self._lower(input_ids=ids_RT, use_cache=False, **_given(position_RT, mask_R1TT))[0]
        return found

    def upper(self, states_RTD: Tensor, position_RT: Tensor | None, mask_R1TT: Tensor | None) -> Tensor:
        """Last hidden states [R, T, D] from those below the cut."""
        given = _given(position_RT, mask_R1TT)
        found: Tensor = self._upper(inputs_embeds=states_RTD, use_cache=False, **given)[0]
        return found

    def check(self, backbone: nn.Module, device: torch.device) -> None:
        """Raise AdapterError unless the halves, one after the other, are the whole."""
        ids_RT = torch.arange(6, device=device).unsqueeze(0)
        with torch.no_grad():
            whole = backbone(input_ids=ids_RT, use_cache=False)[0]
            found = self.upper(self.lower(ids_RT, None, None), None, None)
        if not torch.allclose(whole, found, rtol=1e-3, atol=1e-3):
            raise AdapterError(_refusal(backbone, "its halves, one after the other, are not the whole"))


def _refusal(backbone: nn.Module, why: str) -> str:
    return f"{type(backbone).__name__} cannot be cut below its lowest adapted layer: {why}; set user.cache_bytes=0"


def _given(position_RT: Tensor | None, mask_R1TT: Tensor | None) -> dict[str, Any]:
    return {} if position_RT is None else {"position_ids": position_RT, "attention_mask": mask_R1TT}


def _view(backbone: nn.Module, part: slice) -> nn.Module:
    """The backbone with only these layers; the original stays as it is."""
    view = backbone.__new__(type(backbone))
    view.__dict__ = dict(backbone.__dict__)
    view._modules = dict(backbone._modules)
    layers: Any = backbone.layers
    config: Any = backbone.config
    view.layers = nn.ModuleList(list(layers)[part])
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:  # which mask a layer gets goes by its place in this list
        own = copy.deepcopy(config)
        own.num_hidden_layers, own.layer_types = len(view.layers), list(kinds)[part]
        view.config = own
    return view
