"""Gradient checkpointing of the frozen base: layers keep what enters them and run again in the backward pass.

The rank stages switch it on (`<stage>.gradient_checkpointing`). Chen et al. 2016, "Training deep nets with sublinear
memory cost"; which modules are layers is Hugging Face's own mark.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from proper_ds.errors import AdapterError

Around = Callable[[nn.Module], AbstractContextManager[Any]]


def checkpoint_layers(lm: Any, around: Around = nullcontext) -> int:
    """Make every layer of the base run under checkpointing; returns how many there are.

    Hugging Face's own switch acts in training mode only, in which some bases drop out; ours leaves the mode alone.

    Args:
        around: what a layer's second run happens in.

    Raises:
        AdapterError: where the base has no layers that support it.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not lm.supports_gradient_checkpointing:
        raise AdapterError(
            f"{type(lm).__name__} does not support gradient checkpointing: set gradient_checkpointing=false in"
            " population, group and router, or use another base"
        )
    for layer in layers:
        layer.forward = _twice(layer, around)
    return len(layers)


def _twice(layer: nn.Module, around: Around) -> Callable[..., Any]:
    forward: Callable[..., Any] = layer.forward

    @wraps(forward)
    def checkpointed(*args: Any, **given: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **given)
        # Stopping early would leave ZeRO 3 without the hooks that release a module's weights.
        how: dict[str, Any] = {"context_fn": lambda: (nullcontext(), around(layer)), "early_stop": False}
        return checkpoint(lambda *inner: forward(*inner, **given), *args, use_reentrant=False, **how)

    return checkpointed
