"""The DeepSpeed engine of one stage on one rank: steps, and its state as plain tensors.

State goes in and out through DeepSpeed's own tensor-fragment API, gathered to full tensors, so that a checkpoint holds
no pickles and does not depend on the ZeRO stage or the number of ranks.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import nn

from proper_ds.distributed.apart import Apart
from proper_ds.distributed.checkpoint import Checkpoint, Shard
from proper_ds.distributed.clipping import NormHook, clip_factor
from proper_ds.distributed.ds_config import zero_stage
from proper_ds.distributed.ranks import Ranks
from proper_ds.errors import ConfigError, FleetError, Problem

Tensor = torch.Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


def import_deepspeed(on_gpu: bool) -> Any:
    """The module `deepspeed`, quiet, for GPUs or for CPUs."""
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # On CPU, DeepSpeed would compile a shared-memory op for its inference collectives: half a minute and a C++
    # compiler that training over gloo has no use for.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def refuse_bad_values(ds_config: dict[str, Any], source: str, on_gpu: bool) -> None:
    """Raise ConfigError for what DeepSpeed itself will not take in the ZeRO section: types, ranges, nested keys.

    Called on ranks before anything is loaded: DeepSpeed would say it late, and as if a rank had been lost.
    """
    import_deepspeed(on_gpu)
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**ds_config.get("zero_optimization", {}))
    except ValidationError as error:
        prefix = "distributed.deepspeed:zero_optimization"
        problems = [
            Problem(".".join([prefix, *map(str, each["loc"])]), f"{each['msg']} ({each['input']!r})", "Mend it there.")
            for each in error.errors()
        ]
        raise ConfigError(source, problems) from None


class RankEngine:
    """Trains the parameters of `module` that ask for gradients.

    Args:
        module: its forward takes one batch and returns a scalar loss and a dictionary of numbers to log.
        ds_config: a resolved DeepSpeed configuration.
        apart: what is trained beside it, in the same steps and clipped by the same norm.
    """

    def __init__(self, module: nn.Module, ds_config: dict[str, Any], ranks: Ranks, apart: Sequence[Apart] = ()) -> None:
        deepspeed = import_deepspeed(ranks.device.type == "cuda")
        self._utils = deepspeed.utils
        self.ranks = ranks
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._zero_stage = zero_stage(ds_config)
        self._accumulation = int(ds_config["gradient_accumulation_steps"])
        self._apart, self._max_norm = apart, float(ds_config["gradient_clipping"])
        if not self._zero_stage:
            ds_config = ds_config | {"gradient_clipping": 0.0}  # DeepSpeed would tell no norm: it is clipped here
        if ds_config["bf16"]["enabled"] and any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
            for parameter in self._trained.values():  # DeepSpeed does so where it partitions the whole module itself
                parameter.data = parameter.data.bfloat16()
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module,
            model_parameters=list(self._trained.values()),
            config={"steps_per_print": 1 << 62} | ds_config,
        )
        self._hook = NormHook(self._optimizer) if apart and self._zero_stage else None

    @property
    def module(self) -> nn.Module:
        """The trained module."""
        found: nn.Module = self._engine.module
        return found

    def step(self, batches: list[Any], learning_rate: float) -> dict[str, float]:
        """One optimizer step over this rank's micro-batches; returns the summed numbers to log, and `grad_norm`.

        Losses are divided by what the whole global batch holds, so they are summed over ranks and micro-batches;
        DeepSpeed averages over both, which is undone here.

        Raises:
            FleetError: where loss or gradients are not finite. DeepSpeed's weights may have been updated then: the
                engine is of no more use, and must not be saved.
        """
        assert len(batches) == self._accumulation, "one batch for each accumulation step"
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        logged: dict[str, Tensor] = {}
        norm = 0.0
        for number, batch in enumerate(batches, start=1):
            loss, numbers = self._engine(batch)
            self._engine.backward(loss * (self.ranks.num_ranks * self._accumulation))
            if number == len(batches):
                norm = self._common_norm()
            self._engine.step()
            for name, value in numbers.items():
                logged[name] = logged[name] + value if name in logged else value
        if self._zero_stage:
            norm = float(self._engine.get_global_grad_norm())
        found = {name: float(value) for name, value in logged.items()} | {"grad_norm": norm}
        if norm < 0 or not all(map(math.isfinite, found.values())):  # DeepSpeed may tell such a norm as -1
            told = ", ".join(f"{name} {value}" for name, value in found.items())
            raise FleetError(
                f"loss or gradients are not finite ({told}); lower learning_rate or max_grad_norm, or look for broken"
                " text in the data"
            )
        if self._hook is not None:
            self._hook.take()
        for apart in self._apart:
            apart.step(learning_rate, clip_factor(norm, self._max_norm) / self.ranks.num_ranks)
        return found

    def _common_norm(self) -> float:
        """Tell ZeRO's clipping of the gradients beside its own; without ZeRO, clip here and return the norm."""
        square = torch.zeros((), device=self.ranks.device)
        if self._apart:
            square = torch.stack([apart.reduce() for apart in self._apart]).sum()
            if self.ranks.num_ranks > 1:
                dist.all_reduce(square)
            square = square / self.ranks.num_ranks**2  # backward ran on the loss times the number of ranks
        if self._hook is not None:
            self._hook.give(square)
        if self._zero_stage:
            return 0.0
        grads = [parameter.grad for parameter in self._trained.values() if parameter.grad is not None]
        norm = float((square + sum(grad.square().sum() for grad in grads)).sqrt())
        for grad in grads:
            grad.mul_(clip_factor(norm, self._max_norm))
        return norm

    def state(self) -> dict[str, Tensor]:
        """Full fp32 weights and AdamW moments of all trained parameters, on the first rank's CPU; a collective.

        All ranks gather each of them; only the first, which writes them, copies them to host memory. {} on the others.
        """
        found: dict[str, Tensor] = {}
        for name, parameter in self._trained.items():
            for kind, moment in (("weight", None), *((moment, moment) for moment in MOMENTS)):
                value = self._read(parameter, moment)
                if self.ranks.is_first:
                    found[f"{kind}/{name}"] = value.float().cpu().clone()
        return found

    def shards(self) -> list[Shard]:
        """What this rank holds of parameters trained apart, weights and moments; a collective."""
        return [shard for apart in self._apart for shard in apart.shards()]

    def restore(self, checkpoint: Checkpoint, any_batch: Any) -> None:
        """Continue from a checkpoint of any number of ranks and any ZeRO stage; a collective.

        The module must already hold the checkpoint's weights when the engine is made: under bf16 they are its rounded
        copy. A step with learning rate 0 and no gradient makes DeepSpeed create its moments, which are then set.
        """
        state, num_steps = checkpoint.tensors, checkpoint.num_steps
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
        for _ in range(self._accumulation):
            loss, _ = self._engine(any_batch)
            self._engine.backward(loss * 0.0)
            self._engine.step()
        for apart in self._apart:
            apart.drop()
            apart.restore(checkpoint.rows, num_steps)
        for name, parameter in self._trained.items():
            self._write(parameter, None, state[f"weight/{name}"])
            for moment in MOMENTS:
                self._write(parameter, moment, state[f"{moment}/{name}"])
        inner = getattr(self._optimizer, "optimizer", self._optimizer)
        for held in inner.state.values():
            if "step" in held:
                held["step"] = torch.full_like(held["step"], num_steps) if torch.is_tensor(held["step"]) else num_steps
        for group in inner.param_groups:
            if "step" in group:
                group["step"] = num_steps

    def _read(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        if not _is_sharded(parameter):
            found = parameter.detach() if moment is None else self._optimizer.state[parameter][moment]
        elif moment is None:
            found = self._utils.safe_get_full_fp32_param(parameter)
        else:
            found = self._utils.safe_get_full_optimizer_state(parameter, moment)
        return found.detach()

    def _write(self, parameter: nn.Parameter, moment: str | None, value: Tensor) -> None:
        value = value.to(self.ranks.device)
        if not _is_sharded(parameter):
            target = parameter.data if moment is None else self._optimizer.state[parameter][moment]
            target.copy_(value)
        elif self._zero_stage == 3:
            part = self._own_part(parameter, value)
            if moment is None:
                self._utils.safe_set_local_fp32_param(parameter, part)
            else:
                self._utils.safe_set_local_optimizer_state(parameter, part, moment)
        elif moment is None:
            self._utils.safe_set_full_fp32_param(parameter, value)
        else:
            self._utils.safe_set_full_optimizer_state(parameter, value, moment)

    def _own_part(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's ZeRO-3 partition of a full tensor; the last partition is padded with zeros."""
        size = self._utils.safe_get_local_fp32_param(parameter).numel()
        flat = value.flatten()
        padded = torch.cat([flat, flat.new_zeros(size * self.ranks.num_ranks - flat.numel())])
        return padded.narrow(0, size * self.ranks.rank, size)

    def close(self) -> None:
        """Free what the engine holds; the process group stays."""
        self._engine.destroy()


def _is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
