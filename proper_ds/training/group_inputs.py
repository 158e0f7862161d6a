"""What routers need to know of a batch's users: features, table lines, blocks; for the group and router stages."""

from __future__ import annotations

import numpy as np
import torch

from proper_ds.data.tokens import HISTORY, Example
from proper_ds.model.groups import GroupLevel
from proper_ds.model.user_vectors import UserEncoder, pooled
from proper_ds.training.context import RunContext
from proper_ds.training.features import FeatureData
from proper_ds.training.rank_batch import RankBatch, example_seed
from proper_ds.training.selection import num_history, table_line

Tensor = torch.Tensor


class GroupInputs:
    """Fills batches of one stage."""

    def __init__(
        self, context: RunContext, level: GroupLevel, seed: int, forget: float = 0.0, history_dropout: float = 0.0
    ) -> None:
        """`forget` and `history_dropout` are augmentations of the group stage; see GroupConfig."""
        self._device = context.device
        self._forget, self._history_dropout, self._seed = forget, history_dropout, seed
        self._history, self._num_lines = num_history(context.tokens), level.sizes.num_users
        folder = context.stage("features").path
        self.features = FeatureData(folder) if level.encoder is not None else None
        self._block_U: np.ndarray | None = None
        if self.features is not None and level.encoder is not None and len(level.encoder.centroids):
            self._block_U = all_blocks(level.encoder, self.features)

    def fill(self, made: RankBatch, number: int) -> None:
        """Add to a batch what the routers need.

        A row that trains on an item of its user's history gets a user vector made without that item.
        """
        forgotten = [self._forgets(number, example) for example in made.examples]
        if self.features is None:
            lines = [
                0 if forgets else table_line(e.user, self._history[e.user], self._num_lines)
                for e, forgets in zip(made.examples, forgotten, strict=True)
            ]
            made.line_R = torch.tensor(lines, device=self._device)
            return
        found = [self._mean(self.features, example, number) for example in made.examples]
        known = [count > 0 and not forgets for (_, count), forgets in zip(found, forgotten, strict=True)]
        made.features_RF = torch.stack([pooled_F for pooled_F, _ in found]).to(self._device)
        made.known_R = torch.tensor(known, device=self._device)
        if self._block_U is not None:
            users = np.asarray([example.user for example in made.examples])
            made.block_R = torch.from_numpy(self.blocks(users)).to(self._device)

    def blocks(self, users: np.ndarray) -> np.ndarray:
        """The users' blocks, by the features of their whole histories; only for levels with blocks."""
        assert self._block_U is not None
        return self._block_U[users].astype(np.int64)

    def _forgets(self, number: int, example: Example) -> bool:
        if not self._forget:
            return False
        return example_seed(self._seed, "forget", number, example) < self._forget * (1 << 63)

    def _mean(self, features: FeatureData, example: Example, number: int) -> tuple[Tensor, int]:
        """(pooled features [F] of the user without this very item, number of items in them)."""
        items_IF = features.items(example.user)
        keep = np.ones(len(items_IF), dtype=bool)
        if self._history_dropout:
            generator = np.random.default_rng(example_seed(self._seed, "history", number, example))
            keep = generator.random(len(items_IF)) >= generator.uniform(0, self._history_dropout)
        if example.kind == HISTORY:
            keep[example.position] = False
        kept = torch.from_numpy(keep)
        return pooled(items_IF[kept].sum(0), int(keep.sum())), int(keep.sum())


def all_blocks(encoder: UserEncoder, features: FeatureData) -> np.ndarray:
    """The blocks of all users, in the smallest type that holds them: found once, since every step asks for many."""
    small = np.min_scalar_type(len(encoder.centroids) - 1)
    parts = (encoder.blocks(found_UF.to(encoder.centroids.device)) for found_UF in features.all_pooled())
    return np.concatenate([block_U.cpu().numpy().astype(small) for block_U in parts])
