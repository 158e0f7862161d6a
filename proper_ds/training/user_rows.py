"""Adapters of many users trained on ranks together with something shared: each rank holds a share of them (`Apart`).

Rows and moments lie in host memory; only the users of the step sit in slots on the device. Every user has AdamW
moments, a step counter and clipping of their own, and is moved by no step that they are not in (methods.md 7, row 15).
Used by the joint stage. Shapes: U users of all ranks, S users held here, B users of a step, P numbers in one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from proper_ds.data.tokens import Example
from proper_ds.distributed.apart import AdamSettings, ReadRows
from proper_ds.distributed.checkpoint import Shard
from proper_ds.distributed.ranks import Ranks
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.lora import LoraLayout, SlotBuffers

Tensor = torch.Tensor

NAME = "user_rows"
_USERS_PER_READ = 64


def users_per_rank(num_users: int, num_ranks: int) -> int:
    """Rank r holds users at places `r C` up to `(r + 1) C` of the list of them all; this is C."""
    return -(-num_users // num_ranks)


class UserRows:
    """See the module's docstring.

    Attributes:
        rows_SP: the adapters held here, as of the last step.
        num_steps_S: optimizer steps that each has made.
    """

    def __init__(
        self,
        model: PersonalModel,
        layout: LoraLayout,
        users: np.ndarray,
        read: Callable[[Sequence[int]], Tensor],
        ranks: Ranks,
        settings: AdamSettings,
        *,
        max_grad_norm: float,
        rate_ratio: float,
        dropout: float,
    ) -> None:
        """Takes the users of all ranks, ascending.

        Args:
            read: gives the adapters [N, P] that users start from.
            max_grad_norm: of each user's own gradient, of the mean loss over their targets in the step; 0 for none.
            rate_ratio: the users' learning rate, as a multiple of the shared one.
            dropout: of the users' LoRA.
        """
        self._model, self._layout, self._read, self._ranks = model, layout, read, ranks
        self._settings, self._max_grad_norm, self._rate_ratio = settings, max_grad_norm, rate_ratio
        self._dropout, self._num_users = dropout, len(users)
        share = users_per_rank(len(users), ranks.num_ranks)
        self._start = min(len(users), ranks.rank * share)
        held = users[self._start : self._start + share].tolist()
        self._place = {user: place for place, user in enumerate(held)}
        self.rows_SP = torch.zeros(len(held), layout.num_parameters)
        for start in range(0, len(held), _USERS_PER_READ):
            some = held[start : start + _USERS_PER_READ]
            self.rows_SP[start : start + len(some)] = read(some)
        self._moments = [torch.zeros_like(self.rows_SP) for _ in range(2)]
        self.num_steps_S = torch.zeros(len(held))
        self._slot_of: dict[int, int] = {}
        self._targets: dict[int, int] = {}
        self._step_targets = 0
        self._make_slots(8)

    def _make_slots(self, num: int) -> None:
        self._slots = SlotBuffers(self._layout, num, torch.float32, self._ranks.device, trainable=True)
        self.attach()

    def attach(self) -> None:
        """Switch the slots of these users on in the model."""
        self._model.attach_users(self._slots.modules(), self._dropout)

    def seat(self, examples: Sequence[Example], step_targets: int, counts: bool) -> list[int]:
        """Give the examples' users slots for this step, before any of its forward passes; each example's slot.

        Users held by another rank may stand in for missing examples; they are not trained here.

        Args:
            step_targets: target tokens of the whole step over all ranks, which its loss is divided by.
            counts: False for a stand-in.
        """
        self._step_targets = step_targets
        for example in examples:
            user = example.user
            if user not in self._slot_of:
                self._slot_of[user] = len(self._slot_of)
                self._load(user)
            if counts:
                self._targets[user] = self._targets.get(user, 0) + example.num_targets
        return [self._slot_of[example.user] for example in examples]

    def _load(self, user: int) -> None:
        slot = self._slot_of[user]
        if slot >= self._slots.num_slots:
            before = self._slots
            self._make_slots(2 * before.num_slots)
            self._slots.weights_SP[: before.num_slots] = before.weights_SP
        row_P = self.rows_SP[self._place[user]] if user in self._place else self._read([user])[0]
        self._slots.weights_SP[slot] = row_P.to(self._ranks.device)

    def reduce(self) -> Tensor:
        """See Apart: nothing is shared over ranks, and users are clipped by themselves."""
        return torch.zeros((), device=self._ranks.device)

    def step(self, learning_rate: float, factor: float) -> None:
        """See Apart: AdamW on the users of the step, whatever the shared parameters are clipped by (`factor`)."""
        users = [user for user in self._targets if user in self._place]
        assert len(users) == len(self._targets), "examples are placed on the ranks that hold their users"
        if users:
            self._update(users, learning_rate * self._rate_ratio)
        self.drop()
        self._slot_of, self._targets = {}, {}

    def _update(self, users: list[int], rate: float) -> None:
        s, device = self._settings, self._ranks.device
        places = torch.tensor([self._place[user] for user in users])
        slots = torch.tensor([self._slot_of[user] for user in users], device=device)
        assert self._slots.grads_SP is not None
        # backward ran on the loss of the whole step times the number of ranks
        scale = [self._step_targets / self._targets[user] / self._ranks.num_ranks for user in users]
        grads_BP = self._slots.grads_SP[slots] * torch.tensor(scale, device=device).unsqueeze(1)
        if self._max_grad_norm > 0:
            norm_B1 = torch.linalg.vector_norm(grads_BP, dim=1, keepdim=True)
            grads_BP.mul_((self._max_grad_norm / (norm_B1 + 1e-6)).clamp(max=1.0))
        self.num_steps_S[places] += 1
        steps_B1 = self.num_steps_S[places].unsqueeze(1).to(device)
        first_BP = self._moments[0][places].to(device).lerp(grads_BP, 1 - s.betas[0])
        second_BP = self._moments[1][places].to(device) * s.betas[1] + grads_BP.square() * (1 - s.betas[1])
        root_BP = second_BP.sqrt() / (1 - s.betas[1] ** steps_B1).sqrt() + s.eps
        update_BP = first_BP / (1 - s.betas[0] ** steps_B1) / root_BP
        rows_BP = self._slots.weights_SP[slots] * (1 - rate * s.weight_decay) - rate * update_BP
        self.rows_SP[places] = rows_BP.cpu()
        self._moments[0][places], self._moments[1][places] = first_BP.cpu(), second_BP.cpu()

    def drop(self) -> None:
        """See Apart."""
        assert self._slots.grads_SP is not None
        self._slots.grads_SP.zero_()

    def shards(self) -> list[Shard]:
        """See Apart; `user_rows` and the moments, by the users' places in the list of them all."""
        tensors = {NAME: self.rows_SP, f"num_steps/{NAME}": self.num_steps_S}
        tensors |= {f"exp_avg/{NAME}": self._moments[0], f"exp_avg_sq/{NAME}": self._moments[1]}
        return [Shard(name, tensor, self._start, self._num_users) for name, tensor in tensors.items()]

    def restore(self, read: ReadRows, num_steps: int) -> None:
        """See Apart. Users who sit already, for the step to come, get their restored rows."""
        start, stop = self._start, self._start + len(self.rows_SP)
        self.rows_SP = read(NAME, start, stop)
        self._moments = [read(f"{kind}/{NAME}", start, stop) for kind in ("exp_avg", "exp_avg_sq")]
        self.num_steps_S = read(f"num_steps/{NAME}", start, stop)
        for user in self._slot_of:
            self._load(user)
