"""LaMP's metrics on hand-made cases, and against scikit-learn and rouge-score called the way LaMP's evaluator does."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, mean_squared_error

from proper_ds.data.manifest import TaskManifest
from proper_ds.data.tasks import TASKS
from proper_ds.evaluation.bootstrap import intervals, score
from proper_ds.evaluation.metrics import metrics_of, rating_error, scale_of

LABELS = ("a", "b", "c", "d")


def task(name="LaMP_2N", labels=LABELS):
    raw = TaskManifest.of(TASKS[name], "", generated=False).__dict__
    return TaskManifest(**(raw | {"labels": labels}))


def value(metric, golds, given):
    return float(metric.value(sum(metric.statistics(g, p) for g, p in zip(golds, given, strict=True))))


def by_name(name, labels=LABELS, lamp="LaMP_2N"):
    return next(m for m in metrics_of(task(lamp, labels)) if m.name == name)


CASES = st.lists(
    st.tuples(st.sampled_from(LABELS), st.sampled_from([*LABELS, "unknown", " a "])), min_size=1, max_size=40
)


@given(CASES)
def test_accuracy_and_f1_are_scikit_learns_as_lamp_calls_it(pairs):
    golds, given_ = [g for g, _ in pairs], [p for _, p in pairs]
    index = {label: n for n, label in enumerate(LABELS)}
    wanted = [index[g] for g in golds]
    found = [index.get(p.strip(), -1) for p in given_]
    assert value(by_name("accuracy"), golds, given_) == pytest.approx(accuracy_score(wanted, found))
    f1 = f1_score(wanted, found, labels=list(range(4)), average="macro", zero_division=0)
    assert value(by_name("f1_macro"), golds, given_) == pytest.approx(f1)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=30))
def test_mae_and_rmse_are_scikit_learns(pairs):
    golds, given_ = [str(g) for g, _ in pairs], [str(p) for _, p in pairs]
    wanted, found = np.asarray([p[0] for p in pairs]), np.asarray([p[1] for p in pairs])
    ratings = TASKS["LaMP_3"].labels
    assert value(by_name("mae", ratings, "LaMP_3"), golds, given_) == pytest.approx(mean_absolute_error(wanted, found))
    rmse = math.sqrt(mean_squared_error(wanted, found))
    assert value(by_name("rmse", ratings, "LaMP_3"), golds, given_) == pytest.approx(rmse)


@pytest.mark.parametrize(
    ("gold", "given_", "error"),
    [
        ("3", "3", 0),
        ("1", "no idea", 4),  # unparsable: the rating farther from the gold
        ("5", "", -4),
        ("2", "two", 3),
        ("3", "none", 2),  # equally far: LaMP takes 5
        ("4", "10", 6),  # parsable but out of range is kept
        ("4", " 3.5 ", -0.5),
        ("2", "nan", 3),
        ("2", "inf", 3),
    ],
)
def test_ratings_as_lamp_reads_them(gold, given_, error):
    assert rating_error(gold, given_) == pytest.approx(error)


def test_a_scale_of_ones_own_has_ends_of_its_own():
    scale = scale_of(["0", "10", "5"])
    assert scale == (0, 10)
    assert [rating_error(gold, "?", scale) for gold in ("9", "2", "5")] == [-9, 8, 5]
    mae = by_name("mae", ("0", "5", "10"), "LaMP_3")
    assert value(mae, ["10", "0"], ["?", "5"]) == pytest.approx(7.5)


def test_rouge_is_the_mean_of_rouge_score_without_stemming():
    golds = ["The quick brown fox", "Running dogs", "x"]
    given_ = ["the brown quick fox jumps", "run dog", "completely different"]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    for name, kind in (("rouge-1", "rouge1"), ("rouge-L", "rougeL")):
        wanted = np.mean([scorer.score(g, p)[kind].fmeasure for g, p in zip(golds, given_, strict=True)])
        assert value(by_name(name, None, "LaMP_4"), golds, given_) == pytest.approx(wanted)
    assert value(by_name("rouge-1", None, "LaMP_4"), ["Running dogs"], ["run dog"]) == 0


def test_user_mean_and_query_value_differ_as_they_should():
    metric = by_name("accuracy")
    sums = {"one": np.asarray([[1.0, 1.0], [1.0, 3.0]])}  # one right of one, one right of three
    found = score(metric, sums, 200, seed=1)
    assert found.value_M.tolist() == pytest.approx([2 / 4])
    assert found.user_mean_M.tolist() == pytest.approx([(1 + 1 / 3) / 2])
    low, high = intervals(found.value_MB[0], 0.95)
    assert 1 / 3 <= low <= 0.5 <= high <= 1
    low, high = intervals(found.user_mean_MB[0], 0.95)
    assert 1 / 3 <= low <= 2 / 3 <= high <= 1
    again = score(metric, sums, 200, seed=1)
    assert np.array_equal(found.value_MB, again.value_MB)


def test_user_f1_is_over_the_labels_that_user_meets():
    metric = by_name("f1_macro")
    sums = sum(metric.statistics("a", p) for p in ("a", "a", "b"))
    assert float(metric.user_value(sums)) == pytest.approx((2 * 2 / (2 * 2 + 1) + 0) / 2)


@given(st.lists(st.floats(-5, 5), min_size=20, max_size=60))
def test_interval_holds_the_median(samples):
    low, high = intervals(np.asarray(samples), 0.95)
    assert low <= np.median(samples) <= high
