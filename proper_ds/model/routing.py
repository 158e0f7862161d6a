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
        user_RU: each row's user vector; each text's, where there is `text_RT`.
        text_RT: the text that each token belongs to in rows of several texts, from 0; -1 at padding. None where each
            row is one text.
        key_R: each row's dropout key, or [R, T] each token's; None switches dropout off.
        places: where targets are predicted, to run the top of the model there only; not with dropout or `gates`.
        gates: filled with each module's gates [R, T, N] when it is a dictionary.
        prefix_RPD: each row's own input embeddings, which negative token ids stand for (`persona.py`).
    """

    slot_R: Tensor | None = None
    user_RU: Tensor | None = None
    text_RT: Tensor | None = None
    key_R: Tensor | None = None
    places: Places | None = None
    gates: dict[str, Tensor] | None = field(default=None)
    prefix_RPD: Tensor | None = None

    def by_token(self, value_XN: Tensor) -> Tensor:
        """What belongs to rows (or texts), as something that can be added to [R, T, N]."""
        return value_XN.unsqueeze(1) if self.text_RT is None else value_XN[self.text_RT.clamp_min(0)]


def _uniform(*shape: int, fan_in: int, generator: torch.Generator) -> nn.Parameter:
    """Kaiming-uniform with a = sqrt(5): U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound, generator=generator))


def at_least_float(values: Tensor) -> Tensor:
    """The values in fp32, or in fp64 where they are."""
    return values if values.dtype == torch.float64 else values.float()


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over the experts in at least fp32, cast back."""
    return at_least_float(logits).softmax(-1).to(logits.dtype)


class Router(nn.Module):
    """Gates of one module: [R, T, N], each row of N at least 0 and summing to 1."""

    def forward(self, x_RTD: Tensor, user_out_RTE: Tensor | None, rows: Rows) -> Tensor:
        """`x` is the module's input, `user_out` the output of the row's own LoRA there (stage 3), else None."""
        raise AssertionError("subclasses route")


class SummedRouter(Router):
    """Preset `proper`, stage 2: `softmax(W_x x_t + W_u z_u)`, z the user vector shared by all modules.

    Without `with_token` it is `softmax(W_u z_u)`: a user has the same gates at every token.
    With `num_blocks`, the user vector ends in a one-hot of the user's block, and only that block's experts get gates.
    The softmax of summed logits can become as sharp as the data asks for; the released sum of probabilities cannot.
    `W_u` starts at random, so that users with unlike vectors use unlike experts from the first step: experts that all
    see everybody hardly ever come apart.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        user_vector_size: int,
        generator: torch.Generator,
        num_blocks: int | None = None,
        with_token: bool = True,
    ) -> None:
        super().__init__()
        self._num_blocks = num_blocks
        token = _uniform(num_experts, in_features, fan_in=in_features, generator=generator)
        self.token = token if with_token else None  # drawn all the same: other weights begin alike
        spread = user_vector_size**-0.5
        self.user = nn.Parameter(torch.empty(num_experts, user_vector_size).normal_(0, spread, generator=generator))

    def logits(self, x_RTD: Tensor, rows: Rows) -> Tensor:
        """Gate logits [R, T, N] before the softmax."""
        assert rows.user_RU is not None, "user vectors not set"
        user_RU, size = rows.user_RU, self.user.shape[1]
        user_RN = nn.functional.linear(user_RU[:, :size].to(x_RTD.dtype), self.user.to(x_RTD.dtype))
        if self._num_blocks is not None:
            own_RN = user_RU[:, size:].repeat_interleave(len(self.user) // self._num_blocks, dim=1)
            user_RN = user_RN.masked_fill(own_RN == 0, -torch.inf)
        user_RTN = rows.by_token(user_RN)
        if self.token is None:
            return user_RTN.expand(*x_RTD.shape[:2], -1)
        return nn.functional.linear(x_RTD, self.token.to(x_RTD.dtype)) + user_RTN

    def forward(self, x_RTD: Tensor, user_out_RTE: Tensor | None, rows: Rows) -> Tensor:
        """See Router."""
        return _softmax(self.logits(x_RTD, rows))


class ReleasedRouter(Router):
    """Preset `proper-released`, stage 2: `softmax(softmax(W_x x_t) + softmax(W_u e_u))`, e_u this module's own row.

    The user vector holds the rows of all modules side by side; this module's begins at `first`.
    """

    def __init__(self, in_features: int, num_experts: int, first: int, generator: torch.Generator) -> None:
        super().__init__()
        self.token = _uniform(num_experts, in_features, fan_in=in_features, generator=generator)
        self.user = _uniform(num_experts, in_features, fan_in=in_features, generator=generator)
        self._first = first

    def forward(self, x_RTD: Tensor, user_out_RTE: Tensor | None, rows: Rows) -> Tensor:
        """See Router."""
        assert rows.user_RU is not None, "user vectors not set"
        token_RTN = _softmax(nn.functional.linear(x_RTD, self.token.to(x_RTD.dtype)))
        user_RD = rows.user_RU[:, self._first : self._first + x_RTD.shape[-1]].to(x_RTD.dtype)
        user_RN = _softmax(nn.functional.linear(user_RD, self.user.to(x_RTD.dtype)))
        return _softmax(token_RTN + rows.by_token(user_RN))


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


def mean_by_text(values_RTN: Tensor, text_RT: Tensor, num_texts: int) -> Tensor:
    """As `mean_gates`, [X, N] for rows of several texts, told apart by `text_RT` (-1 at padding)."""
    flat_M = text_RT.flatten()
    real_M = flat_M >= 0
    sums_XN = values_RTN.new_zeros(num_texts, values_RTN.shape[-1])
    sums_XN = sums_XN.index_add(0, flat_M[real_M], values_RTN.flatten(0, 1)[real_M])
    counts_X = torch.bincount(flat_M[real_M], minlength=num_texts)
    return sums_XN / counts_X.clamp_min(1).unsqueeze(-1).to(sums_XN.dtype)


def constraint(mean_RN: Tensor) -> Tensor:
    """PROPER's constraint of each row, [R]: the off-diagonal sum of `omega omega^T`, which is `1 - sum omega^2`."""
    return 1 - mean_RN.square().sum(-1)


def imbalance(mean_XN: Tensor, recent_N: Tensor) -> Tensor:
    """How much each text, [X], adds to the uneven use of the experts: `N sum_i m_i (2 w_i - m_i) - 1`.

    w are the text's mean gates, m the shares of the experts over the steps before, which have no gradient. The mean
    over the texts is `N sum_i w_i^2 - 1` of their common shares to first order around m: 0 where all experts are used
    alike. It keeps users from all choosing one expert, which the constraint alone would allow (methods.md 1.4).
    """
    return len(recent_N) * (recent_N * (2 * mean_XN - recent_N)).sum(-1) - 1


def entropy(gates_RTN: Tensor) -> Tensor:
    """Entropy of the gates in nats, [R, T]; log N where uniform."""
    return -(gates_RTN * gates_RTN.clamp_min(1e-12).log()).sum(-1)
