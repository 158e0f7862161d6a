"""Routers: how a module's group experts are mixed, by token, user vector, and the user's own LoRA.

Shapes: R rows, T tokens, D in-features, E out-features, N experts, U user-vector size.
Sources: PROPER (arXiv 2503.01303), sections 3.3 and 3.4, and its released code (callanwu/PROPER at 214b35a,
peft/tuners/lora.py lines 387-428); the names of the presets are explained in `presets.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from proper_ds.model.places import Places

Tensor = torch.Tensor


@dataclass
class Rows:
    """What the adapted modules must know of the rows of the running batch; set before a forward pass.

    Attributes:
        slot_R: each row's slot of user adapters.
        user_RU: each row's user vector (preset `proper`).
        table_R: each row's line in the released user tables.
        key_R: each row's dropout key, or [R, T] each token's; None switches dropout off.
        places: where targets are predicted, to run the top of the model there only; not with dropout or `gates`.
        gates: filled by each router with (module, gates [R, T, N]) when it is a list.
    """

    slot_R: Tensor | None = None
    user_RU: Tensor | None = None
    table_R: Tensor | None = None
    key_R: Tensor | None = None
    places: Places | None = None
    gates: list[tuple[str, Tensor]] | None = field(default=None)


def _uniform(*shape: int, fan_in: int, generator: torch.Generator) -> nn.Parameter:
    """Kaiming-uniform with a = sqrt(5): U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound, generator=generator))


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over the experts in at least fp32, cast back."""
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return exact.softmax(-1).to(logits.dtype)


class Router(nn.Module):
    """Gates of one module: [R, T, N], each row of N at least 0 and summing to 1."""

    def forward(self, x_RTD: Tensor, user_out_RTE: Tensor | None, rows: Rows) -> Tensor:
        """`x` is the module's input, `user_out` the output of the row's own LoRA there (stage 3), else None."""
        raise AssertionError("subclasses route")


class SummedRouter(Router):
    """Preset `proper`, stage 2: `softmax(W_x x_t + W_u z_u)`, z the user vector shared by all modules.

    The softmax of summed logits can become as sharp as the data asks for; the released sum of probabilities cannot.
    `W_u` starts at random, so that users with unlike vectors use unlike experts from the first step: experts that all
    see everybody hardly ever come apart.
    """

    def __init__(self, in_features: int, num_experts: int, user_vector_size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.token = _uniform(num_experts, in_features, fan_in=in_features, generator=generator)
        spread = user_vector_size**-0.5
        self.user = nn.Parameter(torch.empty(num_experts, user_vector_size).normal_(0, spread, generator=generator))

    def logits(self, x_RTD: Tensor, rows: Rows) -> Tensor:
        """Gate logits [R, T, N] before the softmax."""
        assert rows.user_RU is not None, "user vectors not set"
        token_RTN = nn.functional.linear(x_RTD, self.token.to(x_RTD.dtype))
        user_RN = nn.functional.linear(rows.user_RU.to(x_RTD.dtype), self.user.to(x_RTD.dtype))
        return token_RTN + user_RN.unsqueeze(1)

    def forward(self, x_RTD: Tensor, user_out_RTE: Tensor | None, rows: Rows) -> Tensor:
        """See Router."""
        return _softmax(self.logits(x_RTD, rows))


class ReleasedRouter(Router):
    """Preset `proper-released`, stage 2: `softmax(softmax(W_x x_t) + softmax(W_u e_u))`, e_u this module's own row.

    Line 0 of the table stands for users that the stage never saw; the released code has no such user.
    """

    def __init__(self, in_features: int, num_experts: int, num_users: int, generator: torch.Generator) -> None:
        super().__init__()
        self.token = _uniform(num_experts, in_features, fan_in=in_features, generator=generator)
        self.user = _uniform(num_experts, in_features, fan_in=in_features, generator=generator)
        self.table = nn.Parameter(torch.empty(num_users + 1, in_features).normal_(generator=generator))

    def forward(self, x_RTD: Tensor, user_out_RTE: Tensor | None, rows: Rows) -> Tensor:
        """See Router."""
        assert rows.table_R is not None, "table lines not set"
        token_RTN = _softmax(nn.functional.linear(x_RTD, self.token.to(x_RTD.dtype)))
        user_RD = nn.functional.embedding(rows.table_R, self.table).to(x_RTD.dtype)
        user_RN = _softmax(nn.functional.linear(user_RD, self.user.to(x_RTD.dtype)))
        return _softmax(token_RTN + user_RN.unsqueeze(1))

    def set_unknown_user(self, lines: Tensor) -> None:
        """Make line 0, and every other line that was not trained, the mean of the given trained lines."""
        untrained = torch.ones(len(self.table), dtype=torch.bool)
        untrained[lines] = False
        with torch.no_grad():
            self.table[untrained] = self.table[lines].mean(0)


class ReplacingLoraRouter(Router):
    """Preset `proper-released`, stage 3.2: `softmax(W_l o_t)`, o the output of the user's LoRA in this module."""

    def __init__(self, out_features: int, num_experts: int, generator: torch.Generator) -> None:
        super().__init__()
        self.lora = _uniform(num_experts, out_features, fan_in=out_features, generator=generator)

    def forward(self, x_RTD: Tensor, user_out_RTE: Tensor | None, rows: Rows) -> Tensor:
        """See Router."""
        assert user_out_RTE is not None, "the LoRA-aware router needs user adapters"
        return _softmax(nn.functional.linear(user_out_RTE, self.lora.to(x_RTD.dtype)))


class ResidualLoraRouter(Router):
    """Preset `proper`, stage 3.2: `softmax(W_x x_t + W_u z_u + W_l norm(o_t))`, the first two frozen from stage 2.

    `W_l` starts at zero, so the stage starts exactly where 3.1 ended: user adapters are never served under gates they
    were not fitted with. `o` is tiny at first, hence the norm (root mean square over the features); where the user
    has no adapter o = 0 and the stage-2 gates remain.
    """

    def __init__(self, user_router: SummedRouter, out_features: int, num_experts: int) -> None:
        super().__init__()
        self.user_router = user_router
        self.lora = nn.Parameter(torch.zeros(num_experts, out_features))

    def forward(self, x_RTD: Tensor, user_out_RTE: Tensor | None, rows: Rows) -> Tensor:
        """See Router."""
        assert user_out_RTE is not None, "the LoRA-aware router needs user adapters"
        scale = user_out_RTE.square().mean(-1, keepdim=True).add(1e-8).rsqrt()
        logits = nn.functional.linear(user_out_RTE * scale, self.lora.to(x_RTD.dtype))
        return _softmax(self.user_router.logits(x_RTD, rows) + logits)


def mean_gates(gates_RTN: Tensor, mask_RT: Tensor) -> Tensor:
    """Mean gates of each row over its real tokens, [R, N]: the omega of PROPER's constraint."""
    weights_RT = mask_RT.to(gates_RTN.dtype)
    return (gates_RTN * weights_RT.unsqueeze(-1)).sum(1) / weights_RT.sum(1, keepdim=True).clamp_min(1)


def constraint(mean_RN: Tensor) -> Tensor:
    """PROPER's constraint of each row, [R]: the off-diagonal sum of `omega omega^T`, which is `1 - sum omega^2`."""
    return 1 - mean_RN.square().sum(-1)


def imbalance(mean_RN: Tensor, weight_R: Tensor) -> Tensor:
    """How unevenly the rows together use the experts: `N sum_i m_i^2 - 1`, 0 where all are used alike.

    It keeps users from all choosing one expert, which the constraint alone would allow (methods.md 1.4).
    """
    share_N = (mean_RN * weight_R.unsqueeze(-1)).sum(0) / weight_R.sum().clamp_min(1)
    return len(share_N) * share_N.square().sum() - 1


def entropy(gates_RTN: Tensor) -> Tensor:
    """Entropy of the gates in nats, [R, T]; log N where uniform."""
    return -(gates_RTN * gates_RTN.clamp_min(1e-12).log()).sum(-1)
