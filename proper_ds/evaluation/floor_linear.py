"""Floors for labels and ratings: a linear bag of words, and what the user's own history adds. `floors.py` picks one.

How much the user's own side weighs in `words+own` is chosen on the training users' questions, by a bag of words that
was fitted without these users (half of them, and then the other half the other way round).
Shapes: S samples, C cases, L labels.
"""

from __future__ import annotations

import statistics
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from proper_ds.data.manifest import TaskManifest
from proper_ds.evaluation.floor_base import Case, Floor, Sample, sklearn_parts, vectorizer
from proper_ds.files import seed_of

CLASS_PENALTIES = (3.0, 30.0)
RIDGE_PENALTIES = (1.0, 3.0, 10.0, 30.0)
MAX_TUNING_CASES = 500
OWN_STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""How many items the population counts for beside the user's own."""


def _halves(samples: Sequence[Sample]) -> list[list[Sample]]:
    halves: list[list[Sample]] = [[], []]
    for sample in samples:
        halves[_half_of(sample.user)].append(sample)
    return halves


def _half_of(user: str) -> int:
    return seed_of("half", user) % 2


class _Tuned(Floor):
    """A floor whose bag of words has a penalty, and whose own side has a strength, both chosen by cross-fitting."""

    penalties: tuple[float, ...]
    longest_run: int
    """Of words that count together."""

    def fit(self, samples: Sequence[Sample], penalties: Sequence[float]) -> list[tuple[Any, Any]]:
        """A bag of words for each penalty: how texts become features, and the regression on these."""
        words = vectorizer(self.longest_run)
        features = words.fit_transform([sample.text for sample in samples])
        return [(words, self.regression(features, [sample.answer for sample in samples], value)) for value in penalties]

    @abstractmethod
    def regression(self, features: Any, answers: list[str], penalty: float) -> Any:
        """Fitted to the answers."""

    @abstractmethod
    def predict(self, model: Any, texts: Sequence[str]) -> np.ndarray:
        """What the bag of words makes of each text [C, ...]."""

    @abstractmethod
    def evidence(self, model: Any, cases: Sequence[Case]) -> np.ndarray:
        """What each case's own history says of its user [C, ...]."""

    @abstractmethod
    def combined(self, predicted: np.ndarray, evidence: np.ndarray, strength: float) -> np.ndarray:
        """Both together, in the form of `predicted`; the population counts for `strength` items."""

    @abstractmethod
    def decided(self, predicted: np.ndarray) -> list[str]:
        """The answers."""

    @abstractmethod
    def error(self, answer: str, gold: str) -> float:
        """How wrong an answer is."""

    @cached_property
    def chosen(self) -> tuple[float, float]:
        """(penalty, strength) with the least error on the training users' questions."""
        halves = _halves(self.samples)
        asked = [[case for case in self.cases if case.own and _half_of(case.own[0].user) == half] for half in (0, 1)]
        if not all(halves) or not all(asked):
            return self.penalties[0], 1.0
        errors: dict[tuple[float, float | None], float] = defaultdict(float)
        for half in (0, 1):
            cases = asked[half][:: 1 + len(asked[half]) // MAX_TUNING_CASES]
            for penalty, model in zip(self.penalties, self.fit(halves[1 - half], self.penalties), strict=True):
                predicted, evidence = self.predict(model, [case.text for case in cases]), self.evidence(model, cases)
                for strength in (None, *OWN_STRENGTHS):
                    both = predicted if strength is None else self.combined(predicted, evidence, strength)
                    answers = zip(self.decided(both), cases, strict=True)
                    errors[penalty, strength] += sum(self.error(answer, case.answer) for answer, case in answers)
        penalty = min(self.penalties, key=lambda value: errors[value, None])
        return penalty, min(OWN_STRENGTHS, key=lambda value: errors[penalty, value])

    @cached_property
    def model(self) -> Any:
        """The bag of words, fitted to all samples."""
        return self.fit(self.samples, [self.chosen[0]])[0]

    def words(self, case: Case) -> str:
        """See Floor."""
        return self.decided(self.predict(self.model, [case.text]))[0]

    def words_and_own(self, case: Case) -> str:
        """See Floor."""
        predicted, evidence = self.predict(self.model, [case.text]), self.evidence(self.model, [case])
        return self.decided(self.combined(predicted, evidence, self.chosen[1]))[0]


class ClassFloor(_Tuned):
    """Labels: logistic regression, times the user's smoothed label shares over everybody's."""

    penalties, longest_run = CLASS_PENALTIES, 1  # pairs of words cost four times as much, and bring little

    def __init__(self, task: TaskManifest, samples: Sequence[Sample], cases: Sequence[Case]) -> None:
        super().__init__(task, samples, cases)
        self._labels = list(task.labels or ())
        counts = Counter(sample.answer for sample in samples)
        self._share_L = np.asarray([counts[label] + 1 for label in self._labels], dtype=np.float64)
        self._share_L /= self._share_L.sum()

    def regression(self, features: Any, answers: list[str], penalty: float) -> Any:
        """Logistic, or where there is one label only, that label; `penalty` is scikit-learn's C."""
        if len(set(answers)) < 2:
            return answers[0]
        return sklearn_parts().linear_model.LogisticRegression(C=penalty, max_iter=300, tol=1e-3).fit(features, answers)

    def predict(self, model: Any, texts: Sequence[str]) -> np.ndarray:
        """Log-probability [C, L] of each label; those that were never seen get the least."""
        words, fitted = model
        found = np.full((len(texts), len(self._labels)), np.log(1e-6))
        if isinstance(fitted, str):
            found[:, self._labels.index(fitted)] = 0.0
            return found
        columns = [self._labels.index(label) for label in fitted.classes_]
        found[:, columns] = np.maximum(fitted.predict_log_proba(words.transform(texts)), np.log(1e-6))
        return found

    def evidence(self, model: Any, cases: Sequence[Case]) -> np.ndarray:
        """How often the user gave each label [C, L]."""
        counts = [Counter(sample.answer for sample in case.own) for case in cases]
        return np.asarray([[count[label] for label in self._labels] for count in counts], dtype=np.float64)

    def combined(self, predicted: np.ndarray, evidence: np.ndarray, strength: float) -> np.ndarray:
        """Bayes: the user's prior in place of everybody's [C, L]."""
        share_CL = (evidence + strength * self._share_L) / (evidence.sum(-1, keepdims=True) + strength)
        found: np.ndarray = predicted + np.log(share_CL) - np.log(self._share_L)
        return found

    def decided(self, predicted: np.ndarray) -> list[str]:
        """The likeliest label."""
        return [self._labels[n] for n in predicted.argmax(-1)]

    def error(self, answer: str, gold: str) -> float:
        """0 or 1."""
        return float(answer != gold)

    def own_habit(self, case: Case) -> str:
        """The most frequent label; of several, the one used last."""
        own = [sample.answer for sample in case.own]
        if not own:
            return self._labels[int(self._share_L.argmax())]
        counts = Counter(reversed(own))
        return max(counts, key=counts.__getitem__)


class RatingFloor(_Tuned):
    """Ratings: ridge regression, plus what it usually misses of this user; answers are the nearest rating."""

    penalties, longest_run = RIDGE_PENALTIES, 2

    def regression(self, features: Any, answers: list[str], penalty: float) -> Any:
        """Ridge; `penalty` is scikit-learn's alpha."""
        ratings_S = np.asarray([float(answer) for answer in answers])
        return sklearn_parts().linear_model.Ridge(alpha=penalty).fit(features, ratings_S)

    def predict(self, model: Any, texts: Sequence[str]) -> np.ndarray:
        """Expected ratings [C]."""
        words, fitted = model
        found: np.ndarray = fitted.predict(words.transform(texts))
        return found

    def evidence(self, model: Any, cases: Sequence[Case]) -> np.ndarray:
        """Sum and number of what the bag of words misses in the user's history [C, 2]."""
        own = [sample for case in cases for sample in case.own]
        if not own:
            return np.zeros((len(cases), 2))
        missed = np.asarray([float(sample.answer) for sample in own]) - self.predict(model, [s.text for s in own])
        case_S = np.repeat(np.arange(len(cases)), [len(case.own) for case in cases])
        sums = np.bincount(case_S, missed, minlength=len(cases))
        return np.stack([sums, np.bincount(case_S, minlength=len(cases))], axis=1)

    def combined(self, predicted: np.ndarray, evidence: np.ndarray, strength: float) -> np.ndarray:
        """With the user's offset, shrunk towards none [C]."""
        found: np.ndarray = predicted + evidence[:, 0] / (evidence[:, 1] + strength)
        return found

    def decided(self, predicted: np.ndarray) -> list[str]:
        """The nearest rating."""
        return [self._nearest(value) for value in predicted]

    def error(self, answer: str, gold: str) -> float:
        """The distance of two ratings."""
        return abs(float(answer) - float(gold))

    def _nearest(self, value: float) -> str:
        return min(self.task.labels or (), key=lambda label: abs(float(label) - value))

    def own_habit(self, case: Case) -> str:
        """The median rating, the lower of two."""
        return self._median(case.own) if case.own else self._usual

    @cached_property
    def _usual(self) -> str:
        """Everybody's median: of all samples, so found once."""
        return self._median(self.samples)

    def _median(self, samples: Sequence[Sample]) -> str:
        return self._nearest(statistics.median_low(float(sample.answer) for sample in samples))
