"""Which examples a stage learns from: never a question of an evaluated user, nor a history that it must not see."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proper_ds.config import RunConfig
from proper_ds.data.tokens import HISTORY, QUERY, TokenData
from proper_ds.distributed.ranks import Ranks
from proper_ds.training.group import GroupStage
from proper_ds.training.plora import PloraStage
from proper_ds.training.population import PopulationStage
from proper_ds.training.pplug import PplugStage
from proper_ds.training.router import RouterStage
from proper_ds.training.selection import (
    first_questions,
    num_history,
    router_users,
    training_examples,
    training_users,
)
from proper_ds.training.start import StartStage

SPLITS = ["train", "dev"]
USERS = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.sampled_from([("train", True), ("train", False), ("dev", False)]), max_size=4)),
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
    found = SimpleNamespace(
        num_users=len(users),
        num_examples=len(rows),
        columns=columns,
        blocks=lambda: [(n, min(n + block, len(rows))) for n in range(0, len(rows), block)],
        column=lambda name, start, stop: columns[name][start:stop],
        split_code=SPLITS.index,
        users_of=lambda indices: columns["user"][indices],
    )
    return found


def chosen(indices):
    return {int(n) for block in range(len(indices.counts)) for n in indices.block(block).indices}


@given(USERS, st.integers(1, 6))
def test_the_first_training_question_with_an_answer_wherever_it_stands(users, block):
    tokens = tokens_of(users, block)
    found, rows = first_questions(tokens, "train"), tokens.columns
    for user in range(len(users)):
        mine = (rows["user"] == user) & (rows["kind"] == QUERY) & (rows["split"] == 0) & rows["has_answer"]
        assert found[user] == (np.flatnonzero(mine)[0] if mine.any() else -1)


class Bare:
    """A stage as far as `indices()` needs it: no base, no engine."""

    def __new__(cls, kind, tokens, config, **attributes):
        made = kind.__new__(kind)
        made.context = SimpleNamespace(tokens=tokens, config=config, lane="")
        for name, value in attributes.items():
            setattr(made, name, value)
        return made


def stages_of(tokens, config):
    """By name, what each stage on ranks would learn from."""
    split, train = config.data.train_split, training_users(tokens, config.data.train_split)
    group = Bare(GroupStage, tokens, config)
    group._users = group._chosen_users(with_table=False)
    return {
        "population": lambda: Bare(PopulationStage, tokens, config).indices(),
        "group": group.indices,
        "pplug": lambda: training_examples(tokens, config.pplug.train_on, train, split, "pplug"),
        "router": lambda: training_examples(
            tokens,
            config.router.train_on,
            router_users(tokens, config.router.users, config.router.max_users, split, config.seed),
            split,
            "router",
        ),
        "start": Bare(StartStage, tokens, config, _history=num_history(tokens)).indices,
        "plora": Bare(PloraStage, tokens, config).indices,
    }
