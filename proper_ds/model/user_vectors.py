"""User vectors: from histories (what the population model got wrong about a user, through a small head), or a table.

So a user never seen in training gets groups too, and a user without history is the learned generic user (preset
`proper`). The features come from the loss's gradient on the frozen population model: PROPER's levels learn what the
level before missed, and this is what it missed about this user. (Pooled hidden states alone, tried first, told the
true groups of generated users hardly better than chance: 0.28 to 0.35 for four groups, against 0.72 so.)
Shapes: R rows, T tokens, K target tokens, D hidden size, V vocabulary, F = 2 D feature size, U user-vector size.
"""

from __future__ import annotations

import torch
from torch import nn

from proper_ds.files import seed_of

Tensor = torch.Tensor

SKETCH_SEED = 20250303
_LINES_PER_SEED = 1024
_LLOYD_ROUNDS = 50
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


def pooled(sum_F: Tensor, count: int | Tensor) -> Tensor:
    """A user's features [F] from the sum over `count` items, shrunk towards 0 by how little evidence there is.

    Of many users at once, where the sums are [U, F] and the counts [U, 1].
    """
    return sum_F / (count + PRIOR_ITEMS)


class UserEncoder(nn.Module):
    """`z = W_2 gelu(W_1 (f - mean) / std)`, or the learned generic vector where there is no history.

    Attributes:
        mean, std: of the features over the training users; fixed.
        centroids: of the users' blocks, [B, F]; no rows without block routing.
    """

    mean: Tensor
    std: Tensor
    centroids: Tensor

    def __init__(
        self, feature_size: int, user_vector_size: int, generator: torch.Generator, num_blocks: int = 0
    ) -> None:
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
        self.register_buffer("centroids", torch.zeros(num_blocks, feature_size))

    def normal(self, features_RF: Tensor) -> Tensor:
        """Standardised features."""
        return (features_RF.to(self.mean.dtype) - self.mean) / self.std

    def blocks(self, features_RF: Tensor) -> Tensor:
        """The block [R] of users by the features of their whole history: the nearest centroid's."""
        exact = "donot_use_mm_for_euclid_dist"  # the other way rounds otherwise, by how many are asked for at once
        return torch.cdist(self.normal(features_RF), self.centroids, compute_mode=exact).argmin(1)

    def forward(self, features_RF: Tensor, known_R: Tensor, block_R: Tensor | None = None) -> Tensor:
        """User vectors [R, U]; with blocks [R, U + B], the block as a one-hot behind the rest.

        Args:
            features_RF: pooled item features of each row's user.
            known_R: False where the row's user has no history, or is to be forgotten.
            block_R: each row's block, where the features are not those of the whole history.
        """
        kind = self.inner.dtype
        normal_RF = self.normal(features_RF).to(kind)
        code_RU = nn.functional.gelu(nn.functional.linear(normal_RF, self.inner, self.inner_bias))
        vector_RU = nn.functional.linear(code_RU, self.outer)
        vector_RU = torch.where(known_R.unsqueeze(-1), vector_RU, self.generic)
        if not len(self.centroids):
            return vector_RU
        block_R = self.blocks(features_RF) if block_R is None else block_R
        one_hot_RB = nn.functional.one_hot(block_R, len(self.centroids))
        return torch.cat([vector_RU, one_hot_RB.to(kind)], dim=1)


class UserTable(nn.Module):
    """A learned row per user, [1 + users, W]; line 0 is the unknown user's."""

    def __init__(self, num_lines: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_lines, width))

    def forward(self, line_R: Tensor) -> Tensor:
        """Rows [R, W] of users' lines."""
        return nn.functional.embedding(line_R, self.weight)

    def settle(self, is_trained: Tensor) -> None:
        """Give every line that was not trained the unknown user's: line 0, or the mean of the trained where it is none.

        Args:
            is_trained: mask over the lines, of which one at least was trained.
        """
        with torch.no_grad():
            unknown_W = self.weight[0] if is_trained[0] else self.weight[is_trained].mean(0)
            self.weight[~is_trained] = unknown_W.clone()


def initial_lines(start: int, stop: int, width: int, seed: int) -> Tensor:
    """Rows `start` up to `stop` of a fresh table, N(0, 1) as the released code's; line 0, the unknown user, is zero.

    A function of the line and the seed, so that any number of ranks starts from the same table.
    """
    first = start // _LINES_PER_SEED
    parts = []
    for block in range(first, -(-stop // _LINES_PER_SEED)):
        generator = torch.Generator().manual_seed(seed_of(seed, "user table", block))
        parts.append(torch.empty(_LINES_PER_SEED, width).normal_(generator=generator))
    if not parts:
        return torch.zeros(0, width)
    found = torch.cat(parts)[start - first * _LINES_PER_SEED : stop - first * _LINES_PER_SEED].clone()
    if start == 0 < stop:
        found[0] = 0
    return found


def fit_blocks(normal_UF: Tensor, num_blocks: int, seed: int) -> Tensor:
    """Centroids [B, F] of users' standardised features: k-means (Lloyd 1982) from a k-means++ start.

    Raises:
        ValueError: where there are fewer different users than blocks.
    """
    num_different = len(normal_UF.unique(dim=0))
    if num_different < num_blocks:
        raise ValueError(f"only {num_different} users differ, too few for {num_blocks} blocks")
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(len(normal_UF), (1,), generator=generator))
    centres = [normal_UF[first]]
    nearest_U = torch.full((len(normal_UF),), torch.inf)
    for _ in range(num_blocks - 1):
        nearest_U = torch.minimum(nearest_U, torch.cdist(normal_UF, centres[-1].unsqueeze(0)).square().squeeze(1))
        centres.append(normal_UF[int(torch.multinomial(nearest_U, 1, generator=generator))])
    centroids_BF = torch.stack(centres)
    for _ in range(_LLOYD_ROUNDS):
        block_U = torch.cdist(normal_UF, centroids_BF).argmin(1)
        counts_B = torch.bincount(block_U, minlength=num_blocks)
        sums_BF = torch.zeros_like(centroids_BF).index_add_(0, block_U, normal_UF)
        found_BF = torch.where(counts_B[:, None] > 0, sums_BF / counts_B.clamp_min(1)[:, None], centroids_BF)
        if torch.equal(found_BF, centroids_BF):
            break
        centroids_BF = found_BF
    return centroids_BF
