"""Bootstrap over users: intervals for a method's value and, paired, for the difference of two methods.

Users, not questions, are drawn, because one user's questions are not independent.
Shapes: U users, B bootstrap samples, K statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from proper_ds.evaluation.metrics import Metric

_SAMPLES_AT_ONCE = 100


@dataclass(frozen=True)
class Scored:
    """One metric of one method on one set of users.

    Attributes:
        value: over all questions.
        user_mean: mean of the users' own values.
        samples: the value in each bootstrap sample; the same users are drawn for every method.
    """

    value: float
    user_mean: float
    samples: np.ndarray

    def interval(self, confidence: float) -> tuple[float, float]:
        """Percentile interval of the value."""
        return percentiles(self.samples, confidence)


def percentiles(samples: np.ndarray, confidence: float) -> tuple[float, float]:
    """The central interval that holds `confidence` of the samples."""
    edge = (1 - confidence) / 2
    low, high = np.quantile(samples, [edge, 1 - edge])
    return float(low), float(high)


def _draws(num_users: int, num_samples: int, seed: int) -> Iterator[np.ndarray]:
    """[b, U] counts of how often each user is drawn, some samples at a time."""
    generator = np.random.default_rng(seed)
    for start in range(0, num_samples, _SAMPLES_AT_ONCE):
        size = min(_SAMPLES_AT_ONCE, num_samples - start)
        yield generator.multinomial(num_users, np.full(num_users, 1 / num_users), size=size)


def score(metric: Metric, sums_UK: np.ndarray, num_samples: int, seed: int) -> Scored:
    """Score a metric from each user's summed statistics."""
    value = float(metric.value(sums_UK.sum(0)))
    user_mean = float(np.mean(metric.user_value(sums_UK)))
    samples = [metric.value(draws @ sums_UK) for draws in _draws(len(sums_UK), num_samples, seed)]
    return Scored(value, user_mean, np.concatenate(samples))
