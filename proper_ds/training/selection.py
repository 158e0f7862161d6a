"""Which examples and users a stage learns from; pure functions of the tokenised data's columns, read block by block.

Masks and counts over users take some bytes a user; nothing takes bytes an example.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from proper_ds.data.indices import Indices
from proper_ds.data.tokens import HISTORY, QUERY, TokenData
from proper_ds.errors import DataError
from proper_ds.files import seed_of


def users_with_queries(tokens: TokenData, split: str) -> np.ndarray:
    """Mask over users: those with a question in `split`."""
    mask = np.zeros(tokens.num_users, dtype=bool)
    for block in tokens.blocks():
        asked = (tokens.column("kind", *block) == QUERY) & (tokens.column("split", *block) == tokens.split_code(split))
        mask[tokens.column("user", *block)[asked]] = True
    return mask


def training_users(tokens: TokenData, train_split: str) -> np.ndarray:
    """Mask over users: those with a question in the training split, or with no question at all."""
    asked = np.zeros(tokens.num_users, dtype=bool)
    for block in tokens.blocks():
        asked[tokens.column("user", *block)[tokens.column("kind", *block) == QUERY]] = True
    return users_with_queries(tokens, train_split) | ~asked


def training_examples(
    tokens: TokenData, train_on: Sequence[str], users: np.ndarray, train_split: str, stage: str
) -> Indices:
    """Indices of the examples a stage learns from.

    Args:
        train_on: `history`, `queries` or both.
        users: mask over users.
        train_split: only this split's questions are learned from.
        stage: the stage's section, for the message.

    Raises:
        DataError: when there are none.
    """

    def is_chosen(start: int, stop: int) -> np.ndarray:
        kind = tokens.column("kind", start, stop)
        chosen = np.zeros(len(kind), dtype=bool)
        if "history" in train_on:
            chosen |= kind == HISTORY
        if "queries" in train_on:
            in_split = tokens.column("split", start, stop) == tokens.split_code(train_split)
            chosen |= (kind == QUERY) & in_split & tokens.column("has_answer", start, stop)
        return chosen & users[tokens.column("user", start, stop)]

    found = Indices(tokens, is_chosen)
    if not len(found):
        raise DataError(
            f"stage {stage} has nothing to learn from: {int(users.sum())} users, {stage}.train_on {list(train_on)},"
            f" questions of split {train_split!r}; change {stage}.train_on, {stage}.users or data.train_split"
        )
    return found


def router_users(tokens: TokenData, users: str, max_users: int | None, train_split: str, seed: int) -> np.ndarray:
    """Mask over the users that the LoRA-aware router learns from: a seeded sample of those with history."""
    mask = training_users(tokens, train_split) if users == "train" else np.ones(tokens.num_users, dtype=bool)
    mask = mask & (num_history(tokens) > 0)
    if max_users is not None and mask.sum() > max_users:
        order = np.random.default_rng(seed_of(seed, "router users")).permutation(np.flatnonzero(mask))
        mask = np.zeros_like(mask)
        mask[order[:max_users]] = True
    return mask


def first_questions(tokens: TokenData, train_split: str) -> np.ndarray:
    """By user, the index of the first question of the training split that has an answer; -1 where there is none."""
    found = np.full(tokens.num_users, -1, dtype=np.int64)
    for start, stop in tokens.blocks():
        asked = (tokens.column("kind", start, stop) == QUERY) & tokens.column("has_answer", start, stop)
        asked &= tokens.column("split", start, stop) == tokens.split_code(train_split)
        users, places = np.unique(tokens.column("user", start, stop)[asked], return_index=True)
        is_new = found[users] < 0  # a user's examples may lie in two blocks
        found[users[is_new]] = start + np.flatnonzero(asked)[places[is_new]]
    return found


def table_line(user: int, num_items: int, num_users: int) -> int:
    """A user's line in released user tables made for `num_users` users.

    It is line 0, the unknown user's, for those without history and for those that came after the tables were trained.
    """
    return user + 1 if num_items and user < num_users else 0


def num_history(tokens: TokenData) -> np.ndarray:
    """History items of each user."""
    found = np.zeros(tokens.num_users, dtype=np.int64)
    for block in tokens.blocks():
        np.add.at(found, tokens.column("user", *block)[tokens.column("kind", *block) == HISTORY], 1)
    return found


def num_tokens(tokens: TokenData) -> np.ndarray:
    """Tokens of each user's examples."""
    found = np.zeros(tokens.num_users, dtype=np.int64)
    for block in tokens.blocks():
        np.add.at(found, tokens.column("user", *block), tokens.column("num_tokens", *block))
    return found
