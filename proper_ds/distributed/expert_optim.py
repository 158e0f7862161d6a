"""AdamW for the experts that a rank holds: gradients summed over the replicas, moments sharded over them (ZeRO 2).

All experts of a rank lie in one flat fp32 buffer, and so do their gradients. Each replica updates its part of it.
Shapes: P numbers of all experts held, C numbers of one replica's part.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from proper_ds.distributed.apart import AdamSettings, ReadRows
from proper_ds.distributed.checkpoint import Shard
from proper_ds.distributed.expert_parallel import ExpertGroups
from proper_ds.model.experts import Experts

Tensor = torch.Tensor

_STATES = ("weight", "exp_avg", "exp_avg_sq")


class ExpertAdamW:
    """Trains the experts of all modules; see `Apart`."""

    def __init__(
        self,
        experts: Mapping[str, Experts],
        num_experts: int,
        groups: ExpertGroups,
        settings: AdamSettings,
        states_device: torch.device,
    ) -> None:
        """Moves the experts' parameters into one buffer; they must lie on their device already.

        Args:
            experts: by the name that checkpoints use.
            num_experts: of all ranks together.
            states_device: where weights and moments are updated: another than the experts' is ZeRO-Offload.
        """
        self._groups, self._num_experts = groups, num_experts
        self._parameters = {
            f"{name}.{kind}": (getattr(held, kind), held.start)
            for name, held in experts.items()
            for kind in ("lora_A", "lora_B")
        }
        parameters = [parameter for parameter, _ in self._parameters.values()]
        num_parts, size = groups.num_replicas, sum(p.numel() for p in parameters)
        self._part = -(-size // num_parts)
        device = parameters[0].device
        self._weights_P = torch.zeros(self._part * num_parts, device=device)
        self._grads_P = torch.zeros_like(self._weights_P)
        start = 0
        for parameter in parameters:
            place = slice(start, start + parameter.numel())
            self._weights_P[place] = parameter.detach().flatten().float()
            parameter.data = self._weights_P[place].view(parameter.shape)
            parameter.grad = self._grads_P[place].view(parameter.shape)
            start = place.stop
        own = slice(groups.replica * self._part, (groups.replica + 1) * self._part)
        self._own_weights_C, self._own_grads_C = self._weights_P[own], self._grads_P[own]
        self._master = torch.nn.Parameter(self._own_weights_C.to(states_device, copy=True))
        self._optimizer = torch.optim.AdamW(
            [self._master], betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )
        self._set_moments(torch.zeros_like(self._master), torch.zeros_like(self._master), 0)

    def _set_moments(self, first_C: Tensor, second_C: Tensor, num_steps: int) -> None:
        state = {"step": torch.tensor(float(num_steps)), "exp_avg": first_C, "exp_avg_sq": second_C}
        self._optimizer.state[self._master] = state

    def reduce(self) -> Tensor:
        """See Apart."""
        groups = self._groups
        if groups.replicas is not None:
            mine_C = torch.empty_like(self._own_grads_C)
            dist.reduce_scatter_tensor(mine_C, self._grads_P, group=groups.replicas)
            self._own_grads_C.copy_(mine_C)
        return self._own_grads_C.square().sum()

    def step(self, learning_rate: float, factor: float) -> None:
        """See Apart."""
        self._master.grad = (self._own_grads_C * factor).to(self._master.device)
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step()
        self._spread(self._master.detach(), self._weights_P)
        self._master.grad = None
        self._grads_P.zero_()

    def drop(self) -> None:
        """See Apart."""
        self._grads_P.zero_()

    def _spread(self, part_C: Tensor, whole_P: Tensor) -> None:
        """Give every replica the others' parts."""
        part_C = part_C.to(whole_P.device)
        if self._groups.replicas is None:
            whole_P.copy_(part_C)
        else:
            dist.all_gather_into_tensor(whole_P, part_C.contiguous(), group=self._groups.replicas)

    def shards(self) -> list[Shard]:
        """See Apart; the first replica writes."""
        found, state = [], self._optimizer.state[self._master]
        whole_P = torch.empty_like(self._weights_P)
        for kind, part_C in zip(_STATES, (self._master.detach(), state["exp_avg"], state["exp_avg_sq"]), strict=True):
            self._spread(part_C, whole_P)
            if self._groups.replica:
                continue
            start = 0
            for name, (parameter, first) in self._parameters.items():
                tensor = whole_P[start : start + parameter.numel()].view(parameter.shape).cpu().clone()
                found.append(Shard(f"{kind}/{name}", tensor, first, self._num_experts))
                start += parameter.numel()
        return found

    def restore(self, read: ReadRows, num_steps: int) -> None:
        """See Apart."""
        wholes = []
        for kind in _STATES:
            parts = [
                read(f"{kind}/{name}", first, first + len(parameter)).flatten()
                for name, (parameter, first) in self._parameters.items()
            ]
            whole_P = torch.zeros_like(self._weights_P, device="cpu")
            whole_P[: sum(map(len, parts))] = torch.cat(parts)
            wholes.append(whole_P)
        self._weights_P.copy_(wholes[0])
        own = slice(self._groups.replica * self._part, (self._groups.replica + 1) * self._part)
        device = self._master.device
        with torch.no_grad():
            self._master.copy_(wholes[0][own])
        self._set_moments(wholes[1][own].to(device), wholes[2][own].to(device), num_steps)
