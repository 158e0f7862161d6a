"""A base that is cut into its ZeRO-3 shards while it is loaded: no rank ever holds more than one parameter whole.

`training/context.py` calls it before the engine is made, which then finds the base partitioned and leaves it so.
Frozen weights need no gradients, master copies or moments: a rank holds its share of the base in the base's type, which
`offload_param` may put in host memory or on NVMe as ever.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from proper_ds.distributed.engine import import_deepspeed

Tensor = torch.Tensor

_M_MMAP_THRESHOLD = -3
_SECOND_RUN = "second run"

Read = Callable[[str, torch.Size, int, int], Tensor]
"""(name, shape, start, stop) -> numbers `start` to `stop` of the parameter laid out flat."""


def shard(module: nn.Module, read: Read, ds_config: dict[str, Any], device: torch.device) -> None:
    """Replace parameters on the meta device by ZeRO-3 parameters that hold this rank's part of what `read` gives.

    Every rank calls it; nothing is exchanged. DeepSpeed cuts a parameter from a tensor of its whole size, of which
    only this rank's part is ever written here: on a CPU the rest is never touched, on a GPU it is freed at once.

    Args:
        module: buffers lie where they are to stay.
        ds_config: a resolved DeepSpeed configuration of ZeRO stage 3.
    """
    deepspeed = import_deepspeed(device.type == "cuda")
    if device.type == "cpu":
        _give_freed_memory_back()
    deepspeed.init_distributed()  # takes over torch's process group, whose size `zero.Init` reads
    # given a module, even an empty one, DeepSpeed makes linear layers that keep no whole weights for their backward
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=ds_config)
    num_ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    names = {parameter: name for name, parameter in module.named_parameters()}
    made: dict[nn.Parameter, nn.Parameter] = {}
    for parameter, name in names.items():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        size = -(-whole.numel() // num_ranks)
        start = min(size * rank, whole.numel())
        stop = min(start + size, whole.numel())
        if start < stop:
            whole.view(-1)[start:stop] = read(name, whole.shape, start, stop)
        sharded: Any = nn.Parameter(whole, requires_grad=False)
        init._convert_to_deepspeed_param(sharded)
        sharded.partition()
        made[parameter] = sharded
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            owner._parameters[name] = made[parameter]  # tied parameters stay one


def _give_freed_memory_back() -> None:
    """Let the C library map blocks of 1 MiB and more one by one, so that what is freed is gone.

    glibc raises this limit to 32 MiB as blocks are freed, and whole parameters then leave holes between the parts that
    stay: a rank was seen to keep twice what it holds. Other C libraries have no such option and no such limit.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)


@contextmanager
def gathering(module: nn.Module) -> Iterator[None]:
    """Inside, forward passes of a sharded module work before there is an engine, without gradients; a collective.

    Each submodule's own parameters are whole while it runs. Nothing happens to a module that is not sharded.
    """
    handles = []
    for submodule in module.modules():
        own = [parameter for parameter in submodule.parameters(recurse=False) if hasattr(parameter, "ds_id")]
        if own:
            handles.append(submodule.register_forward_pre_hook(_Gather(own)))
            handles.append(submodule.register_forward_hook(_Release(own), always_call=True))
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def holding(layer: nn.Module) -> Iterator[None]:
    """Inside, ZeRO 3 releases none of a layer's parameters: for its second run under gradient checkpointing.

    That run happens in the layer's backward pass, for which DeepSpeed has already gathered parameters of the module
    whose turn it is; the end of the module's second forward would release them.
    """
    own = [parameter for parameter in layer.parameters() if hasattr(parameter, "ds_active_sub_modules")]
    for parameter in own:
        parameter.ds_active_sub_modules.add(_SECOND_RUN)
    try:
        yield
    finally:
        for parameter in own:
            parameter.ds_active_sub_modules.discard(_SECOND_RUN)


class _Gather:
    def __init__(self, parameters: list[Any]) -> None:
        self._parameters = parameters

    def __call__(self, *_: Any) -> None:
        self._parameters[0].all_gather(param_list=self._parameters)


class _Release(_Gather):
    def __call__(self, *_: Any) -> None:
        self._parameters[0].partition(param_list=self._parameters)
