"""Floors: hand-made populations with known answers, no look at golds or at other users, and the reference scores."""

from __future__ import annotations

import json
import statistics
import sys

import pytest

from proper_ds.data.config import DataConfig
from proper_ds.data.prepare import prepare
from proper_ds.data.prepared import PreparedData
from proper_ds.errors import DataError
from proper_ds.evaluation.floor_base import Case, Sample
from proper_ds.evaluation.floor_linear import RatingFloor
from proper_ds.evaluation.floors import predict_floors
from proper_ds.evaluation.methods import FLOORS
from proper_ds.evaluation.metrics import metrics_of
from proper_ds.evaluation.predict_job import SCHEMA
from tests.evaluation.crafted import RATINGS
from tests.fakes import write_json

LABELS = ["sea", "land"]


def person(name, words, answers, query, gold):
    history = [{"input": text, "output": answer} for text, answer in zip(words, answers, strict=True)]
    return {"user": name, "history": history, "query": query, "answer": gold}


def population(folder, dev, labels=LABELS, num_train=12):
    """Fish is sea and cow is land, whoever says so; `moss` says nothing."""
    folder.mkdir()
    train = [person(f"t{n}", ["fish swims", "cow eats"], LABELS, "fish eats", "sea") for n in range(num_train // 2)]
    train += [person(f"u{n}", ["cow runs", "fish dives"], LABELS[::-1], "cow eats", "land") for n in range(num_train)]
    for split, rows in (("train", train), ("dev", dev)):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    write_json(folder / "info.json", {"name": "where", "labels": labels} if labels else {"name": "where"})
    prepare(DataConfig(path=str(folder)), folder / "prepared")
    return PreparedData(folder / "prepared")


def answers(prepared, methods=tuple(FLOORS), max_examples=1000):
    table = predict_floors(prepared, "dev", "train", list(methods), 1, max_examples)
    assert table.schema == SCHEMA
    return {(row["method"], prepared.keys()[row["user"]]): row for row in table.to_pylist()}


DEV = [
    person("fisher", ["moss a", "moss b", "moss c"], ["sea", "sea", "land"], "moss", "sea"),
    person("farmer", ["moss a", "moss b", "moss c"], ["land", "land", "sea"], "moss", "land"),
    person("traveller", ["moss a", "moss b"], ["sea", "land"], "a fish", "sea"),
    {"user": "cold", "history": [], "query": "a fish", "answer": "sea"},
]


def test_labels(tmp_path):
    found = answers(population(tmp_path / "in", DEV))
    given = {key: row["prediction"] for key, row in found.items()}
    assert given["own-habit", "fisher"] == "sea" and given["own-habit", "farmer"] == "land"
    assert given["own-habit", "traveller"] == "land", "of two labels equally often, the later one"
    assert given["words", "traveller"] == given["words", "cold"] == given["words+own", "cold"] == "sea"
    assert given["words", "fisher"] == given["words", "farmer"], "moss alone tells nothing about the user"
    assert given["words+own", "fisher"] == "sea" and given["words+own", "farmer"] == "land"
    assert [found[m, u]["personal"] for m in FLOORS for u in ("fisher", "cold")] == [
        True,
        False,
        False,
        False,
        True,
        False,
    ]


def test_answers_are_gathered_in_parts_and_stay_in_order(tmp_path, monkeypatch):
    prepared = population(tmp_path / "in", DEV)
    whole = predict_floors(prepared, "dev", "train", list(FLOORS), 1, 1000)
    monkeypatch.setattr("proper_ds.evaluation.floors.ROWS_AT_ONCE", 3)
    parts = predict_floors(prepared, "dev", "train", list(FLOORS), 1, 1000)
    assert parts.equals(whole) and parts.column("user").num_chunks == 2 * len(FLOORS)
    assert whole.column("method").to_pylist() == [method for method in FLOORS for _ in DEV]


def test_no_gold_and_no_other_user_is_looked_at(tmp_path):
    before = answers(population(tmp_path / "a", DEV))
    others = [{**row, "answer": "land"} for row in DEV[:1]]
    others += [person("farmer", ["fish", "fish"], ["land", "land"], "a fish", "land")]
    after = answers(population(tmp_path / "b", others))
    for method in FLOORS:
        assert after[method, "fisher"]["prediction"] == before[method, "fisher"]["prediction"]
        assert after[method, "fisher"]["gold"] == "land"


def test_what_everybody_rates_is_found_once(monkeypatch):
    """And not anew for every question of a user without history."""
    samples = [Sample("t", "words", answer) for answer in "11223"]
    floor, num_medians, median_low = RatingFloor(RATINGS, samples, []), [], statistics.median_low
    monkeypatch.setattr(statistics, "median_low", lambda values: num_medians.append(1) or median_low(values))
    assert [floor.own_habit(Case([], "a question", "")) for _ in range(5)] == ["2"] * 5
    assert len(num_medians) == 1
    assert floor.own_habit(Case([Sample("u", "words", answer) for answer in "554"], "a question", "")) == "5"


def test_written_answers_are_cut_or_whole(tmp_path):
    text = "one two three four five six"
    dev = [person("brief", ["a b c", "d e f"], ["x y", "z w"], text, "?")]
    given = answers(population(tmp_path / "in", dev, labels=None))
    assert given["own-habit", "brief"]["prediction"] == "one two"
    assert given["words", "brief"]["prediction"] == "one", "answers of the training users are one word long"


def test_questions_without_anybody_to_learn_from_are_refused(tmp_path):
    prepared = population(tmp_path / "in", DEV)
    with pytest.raises(DataError, match=r"training users \('other'\) have no examples"):
        predict_floors(prepared, "dev", "other", ["words"], 1, 10)


def test_missing_scikit_learn_is_said(tmp_path, monkeypatch):
    prepared = population(tmp_path / "in", DEV)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    assert answers(prepared, ["own-habit"])
    with pytest.raises(DataError, match="pip install scikit-learn"):
        answers(prepared, ["words"])


@pytest.mark.parametrize(
    ("name", "metric", "reference"),
    [  # what the data sets' own description says of: own profile alone, words alone
        ("email_polish", "rouge-1", {"words": 0.57}),
        ("acl_author", "accuracy", {"own-habit": 0.71}),
        ("movie_rating", "mae", {"own-habit": 0.81, "words": 0.84, "words+own": 0.76}),
    ],
)
def test_reference_scores_of_the_shared_data(shared_data, tmp_path, name, metric, reference):
    prepare(DataConfig(path=str(shared_data / name)), tmp_path / "out")
    prepared = PreparedData(tmp_path / "out")
    table = predict_floors(prepared, "dev", "train", list(reference), 1, 50_000)
    (measure,) = (m for m in metrics_of(prepared.manifest.tasks[name]) if m.name == metric)
    for method, wanted in reference.items():
        rows = [row for row in table.to_pylist() if row["method"] == method]
        found = float(measure.value(sum(measure.statistics(row["gold"], row["prediction"]) for row in rows)))
        worse = wanted - found if measure.higher_is_better else found - wanted
        assert worse < 0.015, (method, found, wanted)
