"""Whose adapters method `merged` merges: training users with much history, never a user whose answers are scored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from proper_ds.data.tokens import TokenData
from proper_ds.errors import DataError
from proper_ds.files import seed_of
from proper_ds.training.selection import num_history, training_users, users_with_queries

if TYPE_CHECKING:
    from proper_ds.config import RunConfig


def merge_anchors(tokens: TokenData, config: RunConfig) -> np.ndarray:
    """Mask over the users that may be merged from: `merge.num_anchors` with most history, ties in a seeded order.

    Raises:
        DataError: where every training user is evaluated, too, or has no history.
    """
    train = training_users(tokens, config.data.train_split)
    return anchors_among(num_history(tokens), train, users_with_queries(tokens, config.evaluation.split), config)


def anchors_among(num_items: np.ndarray, train: np.ndarray, asked: np.ndarray, config: RunConfig) -> np.ndarray:
    """The same from numbers of history items and masks over users: training users, and those who are asked."""
    count = num_items * (train & ~asked)
    order = np.random.default_rng(seed_of(config.seed, "merge anchors")).permutation(np.flatnonzero(count))
    if not len(order):
        raise DataError(
            f"method merged has nobody to merge from: all users with history are asked in split"
            f" {config.evaluation.split!r}, too, and an evaluated user's adapter is never used for another; use data"
            " split by users, or drop the method"
        )
    chosen = order[np.argsort(-count[order], kind="stable")][: config.merge.num_anchors]
    mask = np.zeros(len(num_items), dtype=bool)
    mask[chosen] = True
    return mask
