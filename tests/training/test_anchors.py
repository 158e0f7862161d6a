"""Who may be merged from: never a user whose answers are scored, and those with most history first."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper_ds.config import RunConfig
from proper_ds.data.tokens import HISTORY, QUERY
from proper_ds.errors import DataError
from proper_ds.training.anchors import merge_anchors
from proper_ds.training.set_plan import roles_in, users_to_train

SPLITS = ["train", "dev"]


def tokens_of(users):
    """Users as (number of history items, splits of their questions)."""
    rows = []
    for user, (num_items, splits) in enumerate(users):
        rows += [(user, HISTORY, -1)] * num_items + [(user, QUERY, SPLITS.index(split)) for split in splits]
    columns = dict(zip(("user", "kind", "split"), np.asarray(rows, dtype=np.int64).reshape(-1, 3).T, strict=True))
    return SimpleNamespace(
        num_users=len(users),
        blocks=lambda: [(0, len(rows))],
        column=lambda name, start, stop: columns[name][start:stop],
        split_code=SPLITS.index,
    )


def config(num_anchors=2, seed=1):
    return RunConfig(output_dir="x", seed=seed, merge={"num_anchors": num_anchors, "num_neighbours": 1})


@given(
    users=st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.sampled_from(SPLITS), max_size=2)), min_size=1, max_size=12
    ),
    num_anchors=st.integers(1, 5),
)
def test_anchors_are_training_users_with_most_history(users, num_anchors):
    legal = [n for n, (items, splits) in enumerate(users) if items and "dev" not in splits]
    if not legal:
        with pytest.raises(DataError, match="nobody to merge from"):
            merge_anchors(tokens_of(users), config(num_anchors))
        return
    chosen = np.flatnonzero(merge_anchors(tokens_of(users), config(num_anchors))).tolist()
    assert len(chosen) == min(num_anchors, len(legal))
    assert set(chosen) <= set(legal)
    left = [users[n][0] for n in legal if n not in chosen]
    assert min(users[n][0] for n in chosen) >= max(left, default=0)


def test_ties_are_drawn_by_the_seed():
    users = tokens_of([(2, ["train"])] * 20)
    found = {tuple(np.flatnonzero(merge_anchors(users, config(3, seed)))) for seed in range(4)}
    assert len(found) > 1
    assert np.array_equal(merge_anchors(users, config(3)), merge_anchors(users, config(3)))


def test_needed_are_the_evaluated_and_those_that_something_learns_from():
    users = [(1, ["dev"]), (0, ["dev"]), (5, ["train"]), (2, ["train"]), (3, ["train", "dev"]), (1, [])]
    needed = RunConfig(output_dir="x", user={"users": "needed"}, merge={"num_anchors": 1, "num_neighbours": 1})

    def chosen(*roles, settings=needed):
        context = SimpleNamespace(config=settings, tokens=tokens_of(users))
        return np.flatnonzero(users_to_train(context, roles)).tolist()

    assert chosen("asked") == [0, 4]
    assert chosen("asked", "merged") == [0, 2, 4]
    assert chosen("merged") == [2], "nobody else where adapters are only merged from"
    assert chosen("router") == [0, 2, 3, 4, 5]
    assert chosen(settings=config()) == [0, 2, 3, 4, 5], "all who have history"


def test_what_adapters_are_needed_for_stands_in_the_settings_of_their_set():
    assert roles_in({"r": 4}) == set(), "everybody is trained"
    assert roles_in({"splits": ["train", "dev"]}) == {"asked"}
    assert roles_in({"splits": [], "router_users": ["train", 5]}) == {"asked", "router"}
    assert roles_in({"splits": [], "num_anchors": 5, "asked": False}) == {"merged"}
