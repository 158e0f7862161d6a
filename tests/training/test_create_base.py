"""A base from scratch reads training users' histories only, and says so where there are none."""

from __future__ import annotations

import json

import pytest

from proper_ds.data.config import DataConfig
from proper_ds.data.prepare import prepare
from proper_ds.data.prepared import PreparedData
from proper_ds.errors import DataError
from proper_ds.model.config import CreateBase
from proper_ds.training.create_base import create_base, texts_of


@pytest.fixture
def prepared(tmp_path):
    """`t` is asked in train, `d` in dev, `both` in both, `n` nowhere."""
    asked = {"t": ["train"], "d": ["dev"], "both": ["train", "dev"], "n": []}
    rows = []
    for user, splits in asked.items():
        about = {"user": user, "history": [{"input": f"text of {user}", "output": f"answer of {user}"}]}
        rows += [about | {"split": split, "query": f"{split}?", "answer": "x"} for split in splits] or [about]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/rows.jsonl").write_text("".join(json.dumps({"split": "train"} | row) + "\n" for row in rows))
    prepare(DataConfig(path=[str(tmp_path / "in")]), tmp_path / "prepared")
    return PreparedData(tmp_path / "prepared")


def test_nothing_is_read_of_people_who_are_asked_elsewhere_only(prepared):
    texts = " ".join(texts_of(prepared, ":", "train", 1))
    assert all(f"text of {user}" in texts for user in ("t", "both", "n"))
    assert "text of d" not in texts


def test_too_little_text_names_the_splits_that_there_are(prepared, tmp_path):
    with pytest.raises(DataError, match=r"training users \(split 'train'; the data has .*\) are too few"):
        create_base(prepared, CreateBase(vocab_size=300), tmp_path / "base", ":", "train", 1)
    prepared.manifest.splits.clear()
    empty = type("Empty", (), {"users": lambda self: iter(()), "manifest": prepared.manifest, "folder": "x"})()
    with pytest.raises(DataError, match="x: 0 tokens in the histories"):
        create_base(empty, CreateBase(vocab_size=300), tmp_path / "base", ":", "trian", 1)
