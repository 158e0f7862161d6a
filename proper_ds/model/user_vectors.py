"""User vectors from histories: frozen base states, pooled, through a small trained head (preset `proper`).

So a user never seen in training gets groups too, and a user without history is the learned generic user.
Shapes: R rows, T tokens, D hidden size, F = 2 D feature size, U user-vector size, I history items.
"""

from __future__ import annotations

import torch
from torch import nn

Tensor = torch.Tensor


def item_features(states_RTD: Tensor, num_prompt_R: Tensor, length_R: Tensor) -> Tensor:
    """Features [R, F] of history items: mean state over the prompt, and mean state over the answer.

    The answer's states are kept apart because what a user answers tells more of the user than what was asked.
    """
    position_T = torch.arange(states_RTD.shape[1], device=states_RTD.device)
    in_prompt_RT = position_T < num_prompt_R[:, None]
    in_answer_RT = (position_T < length_R[:, None]) & ~in_prompt_RT
    parts = []
    for mask_RT in (in_prompt_RT, in_answer_RT):
        weight_RT = mask_RT.to(states_RTD.dtype)
        total_RD = (states_RTD * weight_RT.unsqueeze(-1)).sum(1)
        parts.append(total_RD / weight_RT.sum(1, keepdim=True).clamp_min(1))
    return torch.cat(parts, dim=-1)


def without_item(sum_RF: Tensor, count_R: Tensor, own_RF: Tensor) -> tuple[Tensor, Tensor]:
    """Mean features of the rows' users with the row's own item left out, and how many items remain.

    Training on a history item must not see that item in the user vector: the answer stands in it.
    """
    rest_R = count_R - 1
    return (sum_RF - own_RF) / rest_R.clamp_min(1).unsqueeze(-1).to(sum_RF.dtype), rest_R


class UserEncoder(nn.Module):
    """`z = W_2 gelu(W_1 (f - mean) / std)`, or the learned generic vector where there is no history.

    Attributes:
        mean, std: of the features over the training users; fixed.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, feature_size: int, user_vector_size: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / feature_size**0.5

        def fresh(*shape: int, limit: float) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape).uniform_(-limit, limit, generator=generator))

        self.inner = fresh(user_vector_size, feature_size, limit=bound)
        self.inner_bias = nn.Parameter(torch.zeros(user_vector_size))
        self.outer = fresh(user_vector_size, user_vector_size, limit=1 / user_vector_size**0.5)
        self.generic = nn.Parameter(torch.zeros(user_vector_size))
        self.register_buffer("mean", torch.zeros(feature_size))
        self.register_buffer("std", torch.ones(feature_size))

    def forward(self, features_RF: Tensor, known_R: Tensor) -> Tensor:
        """User vectors [R, U].

        Args:
            features_RF: mean item features of each row's user.
            known_R: False where the row's user has no history, or is to be forgotten.
        """
        kind = self.inner.dtype
        normal_RF = ((features_RF.to(self.mean.dtype) - self.mean) / self.std).to(kind)
        code_RU = nn.functional.gelu(nn.functional.linear(normal_RF, self.inner, self.inner_bias))
        vector_RU = nn.functional.linear(code_RU, self.outer)
        return torch.where(known_R.unsqueeze(-1), vector_RU, self.generic)
