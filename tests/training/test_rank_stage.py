"""The step loop of the stages on ranks: what it tells of micro-batches that are larger than was asked for."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import torch

from proper_ds.data.batches import StepPlan
from proper_ds.distributed.ranks import Ranks
from proper_ds.observe.metrics import MetricsFile, read_events
from proper_ds.training import rank_stage
from proper_ds.training.config import GroupConfig
from tests.data.test_order import MadeUp

HERE = Ranks(0, 1, torch.device("cpu"))


def warnings_of(folder, owner_of, caplog):
    """Of a training on 2 ranks of 2 examples each."""
    settings = GroupConfig(per_device_train_batch_size=2, num_train_epochs=3)
    options = {"num_ranks": 2, "per_device": 2, "train_batch_size": 4, "num_epochs": 3, "max_steps": None, "seed": 1}
    plan = StepPlan(MadeUp(40), **options, owner_of=owner_of, num_owners=2)
    stage = SimpleNamespace(
        name="group/proper",
        title="group/proper",
        section="group",
        settings=settings,
        batch=lambda *_: None,
        log_more=lambda ranks: {},
    )
    engine = SimpleNamespace(ranks=HERE, step=lambda batches, rate: {"ce": 1.0, "tokens": 1.0, "grad_norm": 1.0})
    saving = SimpleNamespace(save=lambda *_: None)
    metrics = MetricsFile(folder / "metrics.jsonl")
    with caplog.at_level(logging.WARNING, logger="proper_ds"):
        rank_stage._train(stage, engine, plan, saving, None, metrics)
    return [event["warning"] for event in read_events(folder / "metrics.jsonl")[0] if "warning" in event]


def test_many_examples_of_one_owner_are_told_once(tmp_path, caplog):
    (warning,) = warnings_of(tmp_path, lambda indices: np.zeros(len(indices), dtype=np.int64), caplog)
    assert "step 1 has 4 examples at once on one rank" in warning
    assert "group.per_device_train_batch_size 2" in warning
    assert warning in caplog.text


def test_nothing_is_told_where_examples_go_anywhere(tmp_path, caplog):
    assert not warnings_of(tmp_path, None, caplog)
