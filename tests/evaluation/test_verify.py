"""Reports that can be computed again: from crafted predictions to files and back."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser

import pyarrow.parquet as pq
import pytest
import yaml

from proper_ds.data.manifest import Manifest
from proper_ds.errors import UserError
from proper_ds.evaluation import report_rows
from proper_ds.evaluation.published import OPPU_100, published_for
from proper_ds.evaluation.report_html import html_of
from proper_ds.evaluation.report_text import markdown_of
from proper_ds.evaluation.verify import differences, verify
from tests.evaluation.crafted import CONFIGURATION, RATINGS, ratings, table, write_run

CHANCES = {"own-habit": 0.3, "words": 0.5, "base": 0.2, "population": 0.52, "OPPU": 0.6, "proper": 0.95}


@pytest.fixture
def run(tmp_path):
    """A run's folder with every method's answers in two units, and its report.json."""
    write_run(tmp_path, ratings(CHANCES, num_users=40), references=("population", "OPPU"))
    return tmp_path


def read(run):
    return json.loads((run / "report.json").read_text())


def test_a_report_follows_from_its_predictions(run):
    found = verify(run)
    assert found.problems == []
    assert found.num_files == 12
    assert found.num_numbers > 100


@pytest.mark.parametrize("place", ["methods", "by_history", "comparisons", "floor"])
def test_a_changed_number_is_found(run, place):
    report = read(run)
    task = report["tasks"]["LaMP_3"]
    if place == "methods":
        report["methods"]["proper"]["LaMP_3"]["mae"]["value"] += 1e-6
    elif place == "by_history":
        task["by_history"][1]["methods"]["OPPU"]["rmse"]["interval"][0] += 1e-6
    elif place == "comparisons":
        task["comparisons"]["mae"][0]["verdict"] = "better still"
    else:
        task["floor"]["methods"]["base"]["below_floor"] = False
    (run / "report.json").write_text(json.dumps(report))
    (problem,) = verify(run).problems
    assert place in problem


def test_changed_and_new_files_are_found(run):
    path = run / "predictions" / "OPPU" / "units" / "unit-1.parquet"
    rows = pq.read_table(path).to_pylist()
    pq.write_table(table([rows[0] | {"prediction": "no number"}, *rows[1:]]), path)
    problems = verify(run).problems
    assert problems[0] == "predictions/OPPU/units/unit-1.parquet: changed, new or gone"
    assert any(line.startswith("methods.") for line in problems)


def test_checksums_cannot_be_changed_with_the_predictions(run):
    (run / "predictions.sha256").write_text("")
    assert "predictions.sha256" in verify(run).problems[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"output_dir": "elsewhere"}, None),
        ({"evaluation": {"methods": ["base"], "num_tokens_per_batch": 512}}, None),
        ({"seed": 42}, "not the configuration"),
        ({"evaluation": {"methods": ["base", "OPPU"], "num_tokens_per_batch": 4096}}, "not the configuration"),
        ({"chosen_by": [{"path": "best.yaml"}]}, "chosen_by is not what"),
    ],
)
def test_a_report_of_another_configuration_is_found(run, changes, said):
    """`config.yaml` is written when a run begins, the report when it ends."""
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIGURATION | changes))
    problems = verify(run).problems
    assert len(problems) == (said is not None)
    assert said is None or said in problems[0]


def test_without_report_or_predictions_there_is_nothing_to_verify(run, tmp_path):
    with pytest.raises(UserError, match=r"holds no report\.json"):
        verify(tmp_path / "elsewhere")
    for path in (run / "predictions").rglob("*.parquet"):
        path.unlink()
    with pytest.raises(UserError, match="holds no predictions"):
        verify(run)


def test_differences_sees_keys_kinds_and_numbers_beyond_rounding():
    assert differences({"a": [1.0, {"b": "x"}]}, {"a": [1.0 + 1e-12, {"b": "x"}]}) == []
    assert differences({"a": 1.0}, {"a": 1.0, "c": 2}) == [".c: only one has it"]
    assert len(differences({"a": [1.0, 2.0]}, {"a": [1.0]})) == 1
    assert len(differences({"a": 1.0}, {"a": 1.1})) == 1
    assert len(differences({"a": True}, {"a": False})) == 1


class Tags(HTMLParser):
    """Checks that every element that must be closed is."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_readable_and_marks_what_a_bag_of_words_beats(run):
    report = read(run)
    text = markdown_of(report)
    lines = text.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("| method | mae"))
    order = [line.split("|")[1].strip(" *") for line in lines[first + 2 : first + 2 + len(CHANCES)]]
    assert order[0] == "proper"
    assert "base ▼" in order
    assert "population ≈" in order
    assert "words" in order
    assert "over population" in text
    assert "lower half: over OPPU" in text
    page = html_of(report, [])
    parser = Tags()
    parser.feed(page)
    assert parser.open == []
    assert "<b>method</b>" not in page  # escaped
    assert "base ▼" in page


def test_every_row_is_as_wide_as_its_header(run):
    report = read(run)
    made = [
        report_rows.difference_table(report, "LaMP_3"),
        report_rows.user_mean_table(report, "LaMP_3"),
        report_rows.history_table(report, "LaMP_3"),
        report_rows.halves_table(report, "LaMP_3"),
        report_rows.cost_table(report),
    ]
    for header, rows in made:
        assert len(rows) == len(CHANCES)
        assert {len(row) for row in rows} == {len(header)}


def test_published_figures_are_shown_for_lamps_own_data_only():
    lamps = replace(RATINGS, generated=False)

    def manifest(task=lamps, **more):
        return Manifest({task.name: task}, [], 0, 0, 0, {}, [], **more)

    rows = published_for("LaMP_3", manifest(), OPPU_100, "org/Llama-2-7B-hf")
    same = [row for row in rows if row["method"] == "OPPU" and row["metric"] == "mae"]
    assert [row["value"] for row in same] == [0.179]
    assert not any("protocol" in line or "base" in line for line in same[0]["differs"])
    assert same[0]["differs"]  # never quite the same experiment
    assert all(any("protocol" in d for d in row["differs"]) for row in rows if row["protocol"] != OPPU_100)
    assert published_for("movie_rating", manifest(replace(lamps, name="movie_rating")), OPPU_100, "x") == []
    assert published_for("LaMP_3", manifest(replace(lamps, generated=True)), OPPU_100, "x") == []
    assert published_for("LaMP_3", manifest(replace(lamps, labels=("1", "2"))), OPPU_100, "x") == []
    assert published_for("LaMP_3", manifest(from_rows=["LaMP_3"]), OPPU_100, "x") == []


def test_nothing_is_printed_as_minus_zero():
    pair = {"gain": -1e-9, "interval": [-0.0004, 0.0], "verdict": "no difference beyond the interval"}
    assert report_rows.gain_text(pair) == "+0.000 [0.000, 0.000]"
    assert report_rows.number(-0.0006) == "-0.001"
