"""From predictions to the report's numbers: pairing, history buckets, directions, LaMP files."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper_ds.data.manifest import TaskManifest
from proper_ds.data.tasks import TASKS
from proper_ds.evaluation.answers import SCHEMA
from proper_ds.evaluation.config import EvaluationConfig
from proper_ds.evaluation.plots import expert_spread, gain_by_history, learning_curves
from proper_ds.evaluation.results import answers_of, evaluate_task, expert_use, history_buckets, write_lamp_files

TASK = TaskManifest.of(TASKS["LaMP_3"], "", generated=True)


def table():
    rows = []
    for user in range(30):
        for n in range(3):
            gold = str(1 + (user + n) % 5)
            for method, answer in (("population", "3"), ("OPPU", gold)):
                rows.append(
                    {
                        "method": method,
                        "user": user,
                        "task": "LaMP_3",
                        "id": f"{user}-{n}",
                        "gold": gold,
                        "prediction": answer,
                        "num_history": user,
                        "personal": method == "OPPU",
                        "scores": [],
                        "gates": [0.2, 0.8, 0.9, 0.1] if method == "OPPU" else [],
                        "num_experts": 2,
                    }
                )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def test_a_task_is_scored_for_every_method_bucket_and_pair():
    config = EvaluationConfig(methods=["population", "OPPU"], num_bootstrap_samples=200)
    result = evaluate_task(TASK, answers_of(table(), "LaMP_3", ["population", "OPPU"]), config)
    assert result["methods"]["OPPU"]["mae"]["value"] == 0
    assert set(result["methods"]["population"]["mae"]) == {"value", "user_mean", "interval"}
    (pair,) = result["comparisons"]["mae"]
    assert (pair["method"], pair["than"], pair["verdict"]) == ("OPPU", "population", "better")
    assert pair["gain"] == pytest.approx(result["methods"]["population"]["mae"]["value"])
    assert pair["interval"][0] > 0
    assert result["by_history"][0]["history"] == "0"
    assert sum(bucket["num_users"] for bucket in result["by_history"]) == 30
    assert sum(bucket["num_questions"] for bucket in result["by_history"]) == 90
    for bucket in result["by_history"]:
        assert gain_by_history(result, "mae", "population", ["population", "OPPU"]).startswith("<svg")
        assert bucket["methods"]["OPPU"]["mae"]["value"] == 0


def test_questions_with_hidden_golds_are_not_scored():
    rows = table().to_pylist()
    hidden = [row | {"gold": None} if row["user"] == 3 else row for row in rows]
    answers = answers_of(pa.Table.from_pylist(hidden, schema=SCHEMA), "LaMP_3", ["population", "OPPU"])
    assert 3 not in answers.users
    assert len(answers.ids) == 87


def test_lamp_files_are_what_lamps_evaluator_reads(tmp_path):
    answers = table()
    own = answers.filter(pc.equal(answers.column("method"), "OPPU"))
    write_lamp_files(own, {"LaMP_3": TASK}, tmp_path / "OPPU")
    found = json.loads((tmp_path / "OPPU" / "lamp" / "LaMP_3.json").read_text())
    assert found["task"] == "LaMP_3"
    assert len(found["golds"]) == 90
    assert set(found["golds"][0]) == {"id", "output"}


def test_expert_use_and_plots():
    use = expert_use(table(), ["population", "OPPU"])
    assert list(use) == ["OPPU"]
    assert use["OPPU"]["dominant_share"] == [[0.0, 1.0], [1.0, 0.0]]
    assert use["OPPU"]["mean_largest_gate"] == pytest.approx(0.85)
    assert expert_spread(use).startswith("<svg")
    events = [{"stage": "population", "step": s, "loss": 1 / s, "num_steps": 4} for s in (1, 2, 3, 2, 3, 4)]
    assert learning_curves(events).startswith("<svg")
    assert learning_curves([]) is None


@given(st.lists(st.integers(0, 60), min_size=1, max_size=50))
def test_every_user_falls_into_exactly_one_bucket(lengths):
    history = np.asarray(lengths)
    buckets = history_buckets(history, np.arange(len(lengths)))
    hits = np.zeros(len(lengths), dtype=int)
    for _, low, high in buckets:
        hits += (history >= low) & (history <= high)
    assert (hits == 1).all()
