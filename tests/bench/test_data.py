"""`bench data` in small: what it writes, and that what it measures is what it says."""

from __future__ import annotations

import json

import numpy as np
import pytest

from proper_ds.bench import data_order, packing
from proper_ds.bench.workloads import PRESETS, Preset
from proper_ds.data.tokens import TokenData
from proper_ds.errors import UserError


def test_made_up_examples_are_read_as_they_were_written(tmp_path):
    data_order.write_examples(tmp_path / "made", 2_345)
    tokens = TokenData(tmp_path / "made")
    assert (tokens.num_examples, tokens.num_users) == (2_345, 118)
    assert tokens.range_of(117) == (2_340, 2_345)
    for user, start in ((0, 0), (59, 1_180), (117, 2_340)):
        assert tokens.examples_of(start, start + 1)[0].user == user == tokens.users_of(np.asarray([start]))[0]
    assert [len(e.ids) for e in tokens.examples([7, 2_001])] == tokens.column("num_tokens")[[7, 2_001]].tolist()
    assert data_order.our_step(tmp_path / "made") == 16
    assert data_order.trainers_step(tmp_path / "made") == 64


def test_all_ways_of_packing_train_the_same_tokens(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "small", Preset(16, 24, 1, 2, 2, 64, 1, 1, 8, 8, 0))
    monkeypatch.setattr(packing, "LONGEST", 60)
    packing.bench_packing("small", 4, 1, tmp_path / "packing.json")
    found = json.loads((tmp_path / "packing.json").read_text())
    assert found["padding"]["at random, packed"] < 0.7 * found["padding"]["at random, padded"]
    assert found["max_loss_difference"] < 1e-5
    right = packing.collate
    monkeypatch.setattr(packing, "collate", lambda e, packing: right(e[1:] if packing else e, packing=packing))
    with pytest.raises(UserError, match="do not compute the same"):
        packing.bench_packing("small", 4, 1, None)
