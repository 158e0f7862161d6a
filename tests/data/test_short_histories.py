"""`data.max_history_items` by split: people of whom little is known, beside others with whole histories."""

from __future__ import annotations

import json

import pytest

from proper_ds.data.config import DataConfig
from proper_ds.data.convert import is_for_tuning
from proper_ds.data.prepare import prepare
from proper_ds.data.prepared import PreparedData
from proper_ds.errors import DataError

NUM_ITEMS = 5


@pytest.fixture
def folder(tmp_path):
    """People `t0` to `t9` who are asked in train, `d` in dev, `both` in dev and test; five items each."""
    asked = {f"t{n}": ["train"] for n in range(10)} | {"d": ["dev"], "both": ["dev", "test"]}
    history = [{"input": f"text {n}", "output": "good", "time": f"2020-01-0{n + 1}"} for n in range(NUM_ITEMS)]
    rows = [
        {"user": user, "split": split, "history": history, "query": f"what of {split}", "answer": "bad"}
        for user, splits in asked.items()
        for split in splits
    ]
    path = tmp_path / "in" / "rows.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.parent


def lengths(folder, out, limit, **config):
    prepare(DataConfig(path=[str(folder)], max_history_items=limit, **config), out)
    return {user.key: len(user.history) for user in PreparedData(out).users()}


def test_only_the_named_splits_people_are_cut_and_the_smallest_limit_counts(folder, tmp_path):
    found = lengths(folder, tmp_path / "dev", {"dev": 2})
    assert found == {f"t{n}": NUM_ITEMS for n in range(10)} | {"d": 2, "both": 2}
    found = lengths(folder, tmp_path / "more", {"dev": 3, "test": 1, "train": 4})
    assert found == {f"t{n}": 4 for n in range(10)} | {"d": 3, "both": 1}
    kept = [item.text for user in PreparedData(tmp_path / "more").users() if user.key == "d" for item in user.history]
    assert kept == ["text 2", "text 3", "text 4"]  # the newest


def test_people_who_are_set_apart_for_choices_are_a_split_of_their_own(folder, tmp_path):
    found = lengths(folder, tmp_path / "out", {"tune": 1}, tune_share=0.5)
    tuned = {user for user in found if user.startswith("t") and is_for_tuning(user, 0.5)}
    assert 0 < len(tuned) < 10
    assert {user for user, num in found.items() if num == 1} == tuned


def test_splits_that_are_not_there_are_refused(folder, tmp_path):
    with pytest.raises(DataError, match=r"data\.max_history_items: no question is of split dve; read were dev, test"):
        lengths(folder, tmp_path / "out", {"dve": 2})
    with pytest.raises(DataError, match=r"data\.max_history_items: no question is of split tune"):
        lengths(folder, tmp_path / "out", {"tune": 2})
