"""What a report says of whose questions were asked, and of what it may not be compared with."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from proper_ds.data.config import DataConfig
from proper_ds.data.manifest import Manifest
from proper_ds.data.prepare import prepare
from proper_ds.data.prepared import PreparedData
from proper_ds.data.protocols import hold_out_most_active
from proper_ds.evaluation.config import EvaluationConfig
from proper_ds.evaluation.protocol import cautions, decoding, is_oppu, name_of, split_protocol, users_of
from tests.fakes import write_json


@pytest.mark.parametrize(
    ("trained", "asked", "wanted"),
    [
        ([1, 1, 0], [0, 0, 1], ("user-based", 0.0)),
        ([1, 1, 1], [0, 1, 1], ("time-based", 1.0)),
        ([1, 0, 0], [1, 1, 0], ("mixed", 0.5)),
        ([0, 0, 0], [1, 1, 0], ("no training questions", 0.0)),
    ],
)
def test_the_split_is_told_by_who_has_questions_in_training(trained, asked, wanted):
    assert split_protocol(np.asarray(trained, dtype=bool), np.asarray(asked, dtype=bool)) == wanted


def test_oppus_files_are_known_by_their_names():
    theirs, other = ({"files": [{"name": name}, {"name": "x"}]} for name in ("user_top_100_history.json", "dev.jsonl"))
    assert is_oppu([theirs, theirs])
    assert not is_oppu([theirs, other])


@pytest.fixture
def prepared(tmp_path):
    """Users a and b are in training, b and c are asked; each has two history items of 10 bytes."""
    history = [{"input": "12345678", "output": "ab"}, {"input": "87654321", "output": "cd"}]
    for split, users in (("train", "ab"), ("dev", "bc")):
        rows = [{"user": user, "history": history, "query": f"{split}?", "answer": "x"} for user in users]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    prepare(DataConfig(path=str(tmp_path)), tmp_path / "prepared")
    return PreparedData(tmp_path / "prepared")


def test_users_of_a_split(prepared):
    keys = np.asarray(prepared.keys())
    assert set(keys[users_of(prepared, "train")]) == {"a", "b"}
    assert set(keys[users_of(prepared, "dev")]) == {"b", "c"}
    assert not users_of(prepared, "test").any()


def test_cautions_name_what_makes_it_another_experiment(prepared):
    about = {"split": "dev", "name": "mixed", "share_of_users_also_in_training": 0.5, "closed_labels": "score"}
    found = " ".join(cautions(about, replace(prepared.manifest, num_before_history=7)))
    wanted = ("split dev", "50% of the users", "not LaMP's own data", "by likelihood", "ROUGE", "7 questions are older")
    for word in wanted:
        assert word in found
    about |= {"split": "test", "name": "user-based", "closed_labels": "generate"}
    found = " ".join(cautions(about, prepared.manifest))
    for word in ("split dev", "of the users", "first", "by likelihood", "older"):
        assert word not in found


def ratings(user, n):
    return {"id": f"{user}{n}", "text": f"review {n} of {user}", "score": "4"}


def caution_of(folder, out, **config):
    """Whether the report of data says that it is not LaMP's own."""
    prepare(DataConfig(path=str(folder), **config), out)
    about = {"split": "dev", "name": "mixed", "share_of_users_also_in_training": 0.5, "closed_labels": "score"}
    manifest = Manifest.read(out)
    assert "LaMP_3" in manifest.tasks or "mine" in manifest.tasks
    return any("not LaMP's own data" in line for line in cautions(about, manifest))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_rows_are_never_lamps_own_data(tmp_path, ending):
    rows = [
        {"user": user, "history": [ratings(user, n) for n in range(3)], "query": f"film of {user}", "answer": "3"}
        for user in "ab"
    ]
    (tmp_path / "in").mkdir()
    if ending == "jsonl":
        (tmp_path / "in" / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / "train.parquet")
    assert caution_of(tmp_path / "in", tmp_path / "out", task="LaMP_3")
    raw = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert raw.pop("from_rows") == ["LaMP_3"]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(raw))  # as earlier versions wrote it
    assert Manifest.read(tmp_path / "out").from_rows == []


def test_lamps_form_without_a_name_is_taken_for_lamps_own_data(tmp_path):
    asked = [
        {"id": str(n), "user_id": user, "input": f"film of {user}", "profile": [ratings(user, k) for k in range(3)]}
        for n, user in enumerate("ab")
    ]
    folder = tmp_path / "in"
    write_json(folder / "train_questions.json", asked)
    golds = [{"id": str(n), "output": "3"} for n in range(2)]
    write_json(folder / "train_outputs.json", {"task": "LaMP_3", "golds": golds})
    assert not caution_of(folder, tmp_path / "out")
    write_json(folder / "info.json", {"labels": ["1", "2", "3", "4"]})
    assert caution_of(folder, tmp_path / "labels")
    write_json(folder / "info.json", {"name": "mine"})
    assert caution_of(folder, tmp_path / "named")


def test_what_was_left_out_when_data_was_prepared_is_told_of_the_prepared_folder(prepared, tmp_path):
    config = DataConfig(path=str(tmp_path), max_users_per_split=10, max_history_items=1)
    manifest = prepare(config, tmp_path / "limited")
    about = {"split": "dev", "name": "mixed", "share_of_users_also_in_training": 0.5, "closed_labels": "score"}
    found = " ".join(cautions(about, Manifest.read(tmp_path / "limited")))
    assert "Of each split only the first 10 users" in found and "newest 1 items" in found
    limited = replace(Manifest.read(tmp_path / "limited"), limits={"max_users_per_split": {"train": 9, "dev": 4}})
    told = "Of train only the first 9 users and of dev only the first 4 users took part"
    assert told in " ".join(cautions(about, limited))
    shortened = replace(limited, limits={"max_history_items": {"dev": 2}})
    assert "Of histories of dev only the newest 2 items were used" in " ".join(cautions(about, shortened))
    assert Manifest.read(tmp_path / "limited") == manifest
    assert "set apart for choices" in " ".join(cautions(about, replace(manifest, tune_share=0.2)))


def test_oppus_protocol_on_other_data_is_called_so(prepared, tmp_path):
    hold_out_most_active(prepared, tmp_path / "held", 1)
    held = PreparedData(tmp_path / "held")
    assert name_of(held, "train", "test") == ("1 most active held out", 0.0)
    assert name_of(prepared, "train", "dev") == ("mixed", 0.5)
    about = {"split": "test", "name": "1 most active held out", "closed_labels": "score"}
    assert "the 1 most active users" in " ".join(cautions(about, held.manifest))


def test_decoding_in_words():
    assert "median" in decoding(EvaluationConfig(ordinal="median"))
    assert decoding(EvaluationConfig(closed_labels="generate", max_new_tokens=7)) == "greedy, at most 7 new tokens"
