"""User vectors from histories: what the population model got wrong about a user, pooled, through a small trained head.

So a user never seen in training gets groups too, and a user without history is the learned generic user (preset
`proper`). The features come from the loss's gradient on the frozen population model: PROPER's levels learn what the
level before missed, and this is what it missed about this user. (Pooled hidden states alone, tried first, told the
true groups of generated users hardly better than chance: 0.28 to 0.35 for four groups, against 0.72 so.)
Shapes: R rows, T tokens, K target tokens, D hidden size, V vocabulary, F = 2 D feature size, U user-vector size.
"""

from __future__ import annotations

import torch
from torch import nn

Tensor = torch.Tensor

SKETCH_SEED = 20250303
PRIOR_ITEMS = 3
"""A user's features are their sum over the items divided by the number of items plus this: little evidence, little
deviation from the average user."""


def item_features(state_KD: Tensor, logits_KV: Tensor, target_K: Tensor, row_K: Tensor, head_VD: Tensor) -> Tensor:
    """Features [R, F] of history items, summed over each item's target tokens.

    Two parts of width D: the residuals d = (onehot - p) W, minus the gradient of the cross-entropy by the state h; and
    a sketch of the outer product d h^T (the product of two random sign projections, after Pham and Pagh 2013), which
    says in which contexts the user deviates.

    Args:
        state_KD: last hidden states one before each target token.
        logits_KV: the population model's logits there.
        target_K: the target tokens.
        row_K: each target's row, from 0; every row has at least one.
        head_VD: the output embedding.
    """
    num_rows = int(row_K.max()) + 1
    error_KV = -logits_KV.float().softmax(-1)
    error_KV[torch.arange(len(target_K), device=target_K.device), target_K] += 1
    residual_KD = error_KV @ head_VD.float()
    state_KD = state_KD.float()
    generator = torch.Generator().manual_seed(SKETCH_SEED)
    width = state_KD.shape[1]
    signs = torch.randint(0, 2, (2, width, width), generator=generator).to(state_KD) * 2 - 1
    sketch_KD = (residual_KD @ signs[0]) * (state_KD @ signs[1]) / width
    both_KF = torch.cat([residual_KD, sketch_KD], dim=-1)
    return torch.zeros(num_rows, 2 * width, device=both_KF.device).index_add_(0, row_K, both_KF)


def pooled(sum_F: Tensor, count: int) -> Tensor:
    """A user's features [F] from the sum over `count` items, shrunk towards 0 by how little evidence there is."""
    return sum_F / (count + PRIOR_ITEMS)


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
            features_RF: pooled item features of each row's user.
            known_R: False where the row's user has no history, or is to be forgotten.
        """
        kind = self.inner.dtype
        normal_RF = ((features_RF.to(self.mean.dtype) - self.mean) / self.std).to(kind)
        code_RU = nn.functional.gelu(nn.functional.linear(normal_RF, self.inner, self.inner_bias))
        vector_RU = nn.functional.linear(code_RU, self.outer)
        return torch.where(known_R.unsqueeze(-1), vector_RU, self.generic)
