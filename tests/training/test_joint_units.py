"""What the joint stage puts into its store at the end, and where examples go; only the training is left out."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from proper_ds.distributed.ranks import Ranks
from proper_ds.run_folder import RunFolder
from proper_ds.store.elsewhere import open_store, point_to
from proper_ds.training.joint import USERS_PER_UNIT, JointStage
from proper_ds.training.router import RouterStage
from proper_ds.training.user_rows import NAME
from tests.store.stores import LAYOUT, rows

SAMPLED = np.arange(3, 3 + USERS_PER_UNIT + 6)
EXAMPLES_PER_USER = 2


class Tokens:
    """Knows whose examples are where; has none to read."""

    def users_of(self, indices):
        return indices // EXAMPLES_PER_USER

    def history_digests(self, first, stop):
        return [f"{user:032x}" for user in range(first, stop)]


class Trained:
    """The last checkpoint of a training that gave these adapters."""

    def __init__(self, rows_NP):
        self._tensors = {NAME: rows_NP, f"num_steps/{NAME}": torch.ones(len(rows_NP))}

    def rows(self, name, start, stop):
        return self._tensors[name][start:stop]


@pytest.fixture
def stage(tmp_path, monkeypatch):
    monkeypatch.setattr(RouterStage, "before_start", lambda *_: None)
    made = object.__new__(JointStage)
    made.name, made.num_owners, made._sampled = "store/proper-joint", 4, SAMPLED
    made._ranks, made._adapters = Ranks(0, 1, torch.device("cpu")), SimpleNamespace(layout=LAYOUT)
    nothing = SimpleNamespace(attach_users=lambda *_: None, modules=dict, attach=lambda: None)
    made._rows = made._model = made._slots = nothing
    folder = RunFolder(tmp_path)
    made.context = SimpleNamespace(
        folder=folder,
        stage=folder.stage,
        tokens=Tokens(),
        key_column=pa.array([f"u{user}" for user in range(SAMPLED[-1] + 1)], pa.large_string()),
        config=SimpleNamespace(store=SimpleNamespace(dtype="float32")),
    )
    folder.stage(made.name).begin("inputs")
    point_to(folder.stage(made.name).path, None)
    return made


def stored(stage):
    return open_store(stage.context.folder.stage(stage.name).path)


def test_adapters_that_no_store_takes_are_failures_and_the_run_goes_on(stage):
    made = rows(len(SAMPLED))
    for _, _, b_NEr in LAYOUT.views(made):
        b_NEr[1] = 0
    made[2, 0] = float("nan")
    stage.before_finish(Trained(made))
    failures = stored(stage).failures()
    assert failures.keys() == {"u4", "u5"}
    assert failures["u4"].startswith("the adapter has no effect")
    assert failures["u5"].startswith("weights are not finite")
    assert len(stored(stage).users()) == len(SAMPLED) - 2


def test_units_stand_while_their_checkpoint_does_and_not_when_training_starts_over(stage):
    first, second = rows(len(SAMPLED)), rows(len(SAMPLED), seed=1)
    stage.before_finish(Trained(first))
    stage.before_finish(Trained(second))
    assert torch.equal(stored(stage).get("u3"), first[0]), "after a resume from the last checkpoint"
    stage._sampled = SAMPLED[1:]  # one was forgotten, and the checkpoints with them
    stage.before_start(None, None)
    stage.before_finish(Trained(second))
    assert stored(stage).users() == [f"u{user}" for user in stage._sampled]
    assert torch.equal(stored(stage).get_many(stored(stage).users()), second[: len(stage._sampled)])


def test_examples_go_to_the_rank_that_holds_their_user_and_none_is_read_for_it(stage):
    indices = np.arange(EXAMPLES_PER_USER * SAMPLED[0], EXAMPLES_PER_USER * (SAMPLED[-1] + 1))
    owners = stage.owner_of(indices)
    assert (np.diff(owners) >= 0).all()
    assert sorted(set(owners.tolist())) == [0, 1, 2, 3]
    share = -(-len(SAMPLED) // 4)
    assert np.bincount(owners)[0] == EXAMPLES_PER_USER * share
