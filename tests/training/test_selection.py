"""Which examples a stage learns from: never a question of an evaluated user, nor a history that it must not see."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper_ds.config import RunConfig
from proper_ds.data.tokens import HISTORY, QUERY
from proper_ds.errors import DataError
from proper_ds.training.group import GroupStage
from proper_ds.training.plora import PloraStage
from proper_ds.training.population import PopulationStage
from proper_ds.training.selection import (
    first_questions,
    num_history,
    router_users,
    training_users,
)
from proper_ds.training.start import StartStage

SPLITS = ["train", "dev"]
USERS = st.lists(
    st.tuples(
        st.integers(0, 3), st.lists(st.sampled_from([("train", True), ("train", False), ("dev", False)]), max_size=4)
    ),
    min_size=1,
    max_size=10,
)
"""History items, and questions as (split, whether there is an answer)."""


def tokens_of(users, block=4):
    """Users' examples as columns, in blocks of so many."""
    rows = []
    for user, (num_items, questions) in enumerate(users):
        rows += [(user, HISTORY, -1, n, True) for n in range(num_items)]
        rows += [(user, QUERY, SPLITS.index(s), n, known) for n, (s, known) in enumerate(questions)]
    names = ("user", "kind", "split", "position", "has_answer")
    columns = {name: np.asarray([row[n] for row in rows], dtype=np.int64) for n, name in enumerate(names)}
    columns["has_answer"] = columns["has_answer"].astype(bool)
    columns |= {"num_tokens": np.full(len(rows), 9), "num_prompt": np.full(len(rows), 5)}
    return SimpleNamespace(
        num_users=len(users),
        num_examples=len(rows),
        columns=columns,
        blocks=lambda: [(n, min(n + block, len(rows))) for n in range(0, len(rows), block)],
        column=lambda name, start, stop: columns[name][start:stop],
        split_code=SPLITS.index,
        users_of=lambda indices: columns["user"][indices],
    )


def chosen(indices):
    return {int(n) for block in range(len(indices.counts)) for n in indices.block(block).indices}


@given(USERS, st.integers(1, 6))
def test_the_first_training_question_with_an_answer_wherever_it_stands(users, block):
    tokens = tokens_of(users, block)
    found, rows = first_questions(tokens, "train"), tokens.columns
    for user in range(len(users)):
        mine = (rows["user"] == user) & (rows["kind"] == QUERY) & (rows["split"] == 0) & rows["has_answer"]
        assert found[user] == (np.flatnonzero(mine)[0] if mine.any() else -1)


def bare(kind, tokens, config, **attributes):
    """A stage as far as `indices()` needs it: no base, no engine."""
    made = kind.__new__(kind)
    made.context = SimpleNamespace(tokens=tokens, config=config, lane="")
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def learned_by(kind, tokens, config):
    """Indices of the examples that a stage would learn from; none where it would refuse to begin."""
    made = bare(kind, tokens, config, _history=num_history(tokens))
    if kind is GroupStage:
        made._users = made._chosen_users(has_table=False)
    try:
        return chosen(made.indices())
    except DataError:
        return set()


@pytest.mark.parametrize("kind", [PopulationStage, GroupStage, StartStage, PloraStage])
@given(users=USERS)
def test_no_stage_learns_a_question_of_another_split_nor_a_history_it_must_not_see(kind, users):
    """That of users who are asked and have no training question is PLoRA's alone, which has a vector for each."""
    tokens, config = tokens_of(users), RunConfig(output_dir="x")
    rows, found = tokens.columns, learned_by(kind, tokens, config)
    only_asked = {n for n, (_, asked) in enumerate(users) if asked and all(split == "dev" for split, _ in asked)}
    for n in found:
        assert rows["kind"][n] == HISTORY or (rows["split"][n] == 0 and rows["has_answer"][n])
        assert kind is PloraStage or rows["user"][n] not in only_asked
    if kind is not StartStage:
        trainable = {n for n in range(tokens.num_examples) if rows["kind"][n] == HISTORY}
        assert found >= {n for n in trainable if rows["user"][n] not in only_asked}
    else:
        known = (rows["kind"] == QUERY) & (rows["split"] == 0) & rows["has_answer"]
        wanted = {n for n, (num_items, _) in enumerate(users) if num_items and known[rows["user"] == n].any()}
        assert {int(rows["user"][n]) for n in found} == wanted, "each such user once, whatever stands before"
        assert len(found) == len(wanted)


@given(users=USERS)
def test_routers_learn_from_training_users_with_history(users):
    tokens = tokens_of(users)
    found = router_users(tokens, "train", None, "train", 1)
    assert not (found & ~training_users(tokens, "train")).any()
    assert not (found & (num_history(tokens) == 0)).any()
