"""Paired differences of methods, from bootstrap samples of the same users; `results.py` calls it.

A difference is a gain: positive where the first method is better, whichever way the metric points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from proper_ds.evaluation.bootstrap import MIN_USERS, Scores, intervals
from proper_ds.evaluation.methods import FLOORS

STANDINGS = BELOW, WITHIN, ABOVE = "below", "within the interval", "above"
"""How a method can stand to the best of them, the worst first."""
TOO_FEW = "too few users"


def verdict(interval: list[float] | None) -> str:
    """What an interval of a gain says; nothing where there are too few users to have one."""
    if interval is None:
        return TOO_FEW
    low, high = interval
    return "better" if low > 0 else "worse" if high < 0 else "no difference beyond the interval"


def gain(scores: Scores, method: str, than: str, confidence: float) -> dict[str, Any]:
    """What one method gains over another, over questions and over users' own values, with intervals and a verdict.

    Of fewer than MIN_USERS users there is no interval (None) and no verdict.
    """
    a, b = scores.of(method), scores.of(than)
    sign = 1 if scores.metric.higher_is_better else -1
    interval = scores.interval(sign * (scores.value_MB[a] - scores.value_MB[b]), confidence)
    return {
        "method": method,
        "than": than,
        "gain": sign * float(scores.value_M[a] - scores.value_M[b]),
        "interval": interval,
        "verdict": verdict(interval),
        "user_mean_gain": sign * float(scores.user_mean_M[a] - scores.user_mean_M[b]),
        "user_mean_interval": scores.interval(sign * (scores.user_mean_MB[a] - scores.user_mean_MB[b]), confidence),
    }


def comparisons(scores: Scores, references: Sequence[str], confidence: float) -> list[dict[str, Any]]:
    """Every method against every reference that is there."""
    return [
        gain(scores, method, than, confidence)
        for than in references
        if than in scores.methods
        for method in scores.methods
        if method != than
    ]


def matrix(scores: Scores, confidence: float) -> dict[str, Any]:
    """All pairs: `gain`, `low` and `high` [row][column], of the row's method over the column's; `low` and `high` are
    None of too few users."""
    sign = 1 if scores.metric.higher_is_better else -1
    gain_MM = sign * (scores.value_M[:, None] - scores.value_M)
    found: dict[str, Any] = {"methods": scores.methods, "gain": gain_MM.tolist()}
    if scores.num_users < MIN_USERS:
        return found | {"low": None, "high": None}
    low_MM, high_MM = np.empty_like(gain_MM), np.empty_like(gain_MM)
    for row, samples_B in enumerate(scores.value_MB):
        low_MM[row], high_MM[row] = intervals(sign * (samples_B - scores.value_MB), confidence)
    return found | {"low": low_MM.tolist(), "high": high_MM.tolist()}


def best_floor(scores: Scores) -> str | None:
    """The best of the methods without a language model, or None where none answered."""
    there = [name for name in FLOORS if name in scores.methods]
    sign = 1 if scores.metric.higher_is_better else -1
    return max(there, key=lambda name: sign * scores.value_M[scores.of(name)], default=None)


def against_floor(scores: Scores, confidence: float) -> dict[str, Any] | None:
    """How each method stands to the best floor.

    Attributes of the result: `than`, the floor; `metric`; and by method `gain`, `interval`, `below_floor` and
    `standing`: below (not better), within the interval, or above; None of too few users.
    """
    than = best_floor(scores)
    if than is None:
        return None
    found = {}
    for method in scores.methods:
        if method not in FLOORS:
            pair = gain(scores, method, than, confidence)
            below, interval = pair["gain"] <= 0, pair["interval"]
            standing = None if interval is None else BELOW if below else WITHIN if interval[0] <= 0 else ABOVE
            found[method] = {
                "gain": pair["gain"],
                "interval": interval,
                "below_floor": below,
                "standing": standing,
            }
    return {"than": than, "metric": scores.metric.name, "methods": found}
