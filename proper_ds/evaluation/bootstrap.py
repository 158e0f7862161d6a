"""Bootstrap over users: intervals for a method's value and, paired, for the differences of methods.

Users, not questions, are drawn, because one user's questions are not independent.
Shapes: U users, B bootstrap samples, K statistics, M methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from proper_ds.evaluation.metrics import Metric

MIN_USERS = 10
"""Fewer users have no intervals: resampling a handful says more of who they happen to be than of a method."""
_SAMPLES_AT_ONCE = 100


@dataclass(frozen=True)
class Scores:
    """One metric of several methods on one set of users; the same users are drawn for every method.

    Attributes:
        num_users: who had questions.
        value_M: over all questions.
        user_mean_M: mean of the users' own values.
        value_MB, user_mean_MB: the same in each bootstrap sample.
    """

    methods: list[str]
    metric: Metric
    num_users: int
    value_M: np.ndarray
    user_mean_M: np.ndarray
    value_MB: np.ndarray
    user_mean_MB: np.ndarray

    def of(self, method: str) -> int:
        """A method's line."""
        return self.methods.index(method)

    def interval(self, samples_B: np.ndarray, confidence: float) -> list[float] | None:
        """The central interval that holds `confidence` of the samples; None of too few users to have one."""
        if self.num_users < MIN_USERS:
            return None
        low, high = intervals(samples_B, confidence)
        return [float(low), float(high)]


def intervals(samples: np.ndarray, confidence: float) -> np.ndarray:
    """Of samples [..., B] the central intervals that hold `confidence` of them: [2, ...], low and high."""
    edge = (1 - confidence) / 2
    found: np.ndarray = np.quantile(samples, [edge, 1 - edge], axis=-1)
    return found


def _draws(num_users: int, num_samples: int, seed: int) -> Iterator[np.ndarray]:
    """[b, U] counts of how often each user is drawn, some samples at a time."""
    generator = np.random.default_rng(seed)
    for start in range(0, num_samples, _SAMPLES_AT_ONCE):
        size = min(_SAMPLES_AT_ONCE, num_samples - start)
        yield generator.multinomial(num_users, np.full(num_users, 1 / num_users), size=size).astype(np.float64)


def score(
    metric: Metric, sums: dict[str, np.ndarray], num_samples: int, seed: int, chosen_U: np.ndarray | None = None
) -> Scores:
    """Score a metric from each user's summed statistics [U, K], by method; users in the same order for all.

    Args:
        chosen_U: mask over the users whose scores are asked for; None for all.
    """
    chosen = slice(None) if chosen_U is None else np.flatnonzero(chosen_U)
    sums_UMK = np.stack([sums_UK[chosen] for sums_UK in sums.values()], axis=1)
    num_users, num_methods, width = sums_UMK.shape
    own_UM = metric.user_value(sums_UMK)
    values, means = [], []
    for draws in _draws(num_users, num_samples, seed):
        values.append(metric.value((draws @ sums_UMK.reshape(num_users, -1)).reshape(-1, num_methods, width)))
        means.append(draws @ own_UM / num_users)
    value_M, mean_M = metric.value(sums_UMK.sum(0)), own_UM.mean(0)
    return Scores(list(sums), metric, num_users, value_M, mean_M, np.concatenate(values).T, np.concatenate(means).T)
