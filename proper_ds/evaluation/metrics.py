"""LaMP's metrics, exactly as its eval/evaluation.py defines them (github LaMP-Benchmark/LaMP at 38c9d4d).

Each metric is a sum of statistics over questions and a function of that sum: so the same code gives the value over
all questions, over one user, and over any bootstrap sample of users.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

from proper_ds.data.manifest import TaskManifest
from proper_ds.data.tasks import SCORES
from proper_ds.evaluation.meteor import meteor


@dataclass(frozen=True)
class Metric:
    """One metric of one task.

    Attributes:
        statistics: (gold, prediction) of one question to a vector that is summed over questions.
        value: sums [..., width] to values [...]; nan where there was no question.
        user_value: the same for the questions of one user, where it must differ.
        higher_is_better: the direction.
    """

    name: str
    statistics: Callable[[str, str], np.ndarray]
    value: Callable[[np.ndarray], np.ndarray]
    user_value: Callable[[np.ndarray], np.ndarray]
    higher_is_better: bool


def _ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def _simple(name: str, one: Callable[[str, str], float], higher: bool, after: Any = lambda x: x) -> Metric:
    def value(sums: np.ndarray) -> np.ndarray:
        found: np.ndarray = after(_ratio(sums))
        return found

    return Metric(name, lambda gold, given: np.asarray([one(gold, given), 1.0]), value, value, higher)


def rating_of(given: str) -> float | None:
    """The rating that a text is, or None where it is no number."""
    try:
        rating = float(given.strip())
    except ValueError:
        return None
    return rating if math.isfinite(rating) else None  # "nan" parses, but would leave no mean to report


def rating_error(gold: str, given: str, scale: tuple[float, float] = (1.0, 5.0)) -> float:
    """Prediction minus gold; an unparsable prediction counts as the end of the scale that is farther from the gold."""
    wanted, rating = float(gold.strip()), rating_of(given)
    if rating is None:
        lowest, highest = scale
        rating = lowest if abs(lowest - wanted) > abs(highest - wanted) else highest
    return rating - wanted


def scale_of(labels: Sequence[str]) -> tuple[float, float]:
    """The lowest and the highest rating of a scale."""
    ratings = [float(label) for label in labels]
    return min(ratings), max(ratings)


def _f1_macro(labels: Sequence[str]) -> Metric:
    """Macro F1 over the fixed label list, as LaMP passes it to scikit-learn: a label nobody uses counts as 0.

    A user's own value is over the labels that occur in that user's golds or predictions.
    """
    number = {label: n for n, label in enumerate(labels)}
    width = len(labels)

    def statistics(gold: str, given: str) -> np.ndarray:
        counts = np.zeros((3, width))  # true positives, false positives, false negatives
        wanted, found = number.get(gold.strip(), -1), number.get(given.strip(), -1)
        if wanted == found and wanted >= 0:
            counts[0, wanted] += 1
        else:
            if found >= 0:
                counts[1, found] += 1
            if wanted >= 0:
                counts[2, wanted] += 1
        return counts.reshape(-1)

    def by_label(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        counts = sums.reshape(*sums.shape[:-1], 3, width)
        hit, wrong, missed = counts[..., 0, :], counts[..., 1, :], counts[..., 2, :]
        total = 2 * hit + wrong + missed
        return np.divide(2 * hit, total, out=np.zeros_like(total), where=total > 0), total > 0

    def value(sums: np.ndarray) -> np.ndarray:
        found: np.ndarray = by_label(sums)[0].mean(-1)
        return found

    def user_value(sums: np.ndarray) -> np.ndarray:
        f1, occurs = by_label(sums)
        with np.errstate(invalid="ignore"):
            found: np.ndarray = f1.sum(-1) / occurs.sum(-1)
        return found

    return Metric("f1_macro", statistics, value, user_value, True)


@cache
def _rouge_scorer() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=False)


@lru_cache(maxsize=1 << 18)
def _rouge_of(gold: str, given: str) -> dict[str, float]:
    """Both kinds at once: most of the work is shared, and every task that asks for one asks for the other."""
    scores = _rouge_scorer().score(gold.strip(), given.strip())
    return {kind: float(found.fmeasure) for kind, found in scores.items()}


def rouge(kind: str) -> Callable[[str, str], float]:
    """F-measure of `rouge1` or `rougeL`, no stemming: the defaults of Hugging Face's metric, which LaMP uses.

    That metric reports the median of bootstrap means, which depends on chance; ours reports the mean itself.
    """
    return lambda gold, given: _rouge_of(gold, given)[kind]


def metrics_of(task: TaskManifest) -> list[Metric]:
    """The metrics of a task, in LaMP's order."""

    def error(gold: str, given: str) -> float:
        return rating_error(gold, given, scale_of(task.labels or SCORES))

    made = {
        "accuracy": lambda: _simple("accuracy", lambda gold, given: float(gold.strip() == given.strip()), True),
        "f1_macro": lambda: _f1_macro(task.labels or ()),
        "mae": lambda: _simple("mae", lambda gold, given: abs(error(gold, given)), False),
        "rmse": lambda: _simple("rmse", lambda gold, given: error(gold, given) ** 2, False, np.sqrt),
        "rouge-1": lambda: _simple("rouge-1", rouge("rouge1"), True),
        "rouge-L": lambda: _simple("rouge-L", rouge("rougeL"), True),
        "meteor-stem": lambda: _simple("meteor-stem", meteor, True),
    }
    return [made[name]() for name in task.metrics]
