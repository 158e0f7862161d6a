"""Floors for LaMP-1's choice between two titles, and for written answers. `floors.py` picks one. C: cases."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from proper_ds.data.manifest import TaskManifest
from proper_ds.data.tasks import candidates
from proper_ds.evaluation.floor_base import Case, Floor, Sample, sklearn_parts, vectorizer, words_of
from proper_ds.evaluation.metrics import rouge

MAX_ROUGE_CASES = 500


class ChoiceFloor(Floor):
    """LaMP-1's two candidates: logistic regression on how they differ in words and in likeness to what is known."""

    scale = 10.0
    """Of the likenesses (cosines), so that the penalty, made for single words, does not hold them down."""

    def own_habit(self, case: Case) -> str:
        """The candidate that shares more words with the user's own titles."""
        known = {word for sample in case.own for word in words_of(sample.text.casefold())}
        first, second = (
            len(known & set(words_of(title.casefold()))) / max(1, len(set(words_of(title.casefold()))))
            for title in _titles(case.text)
        )
        return "[1]" if first >= second else "[2]"

    def words(self, case: Case) -> str:
        """By the candidates' words and their likeness to the paper in the question."""
        return str(self._without_own.predict(self._features([case], False))[0])

    def words_and_own(self, case: Case) -> str:
        """By their likeness to the user's own titles as well."""
        return str(self._with_own.predict(self._features([case], True))[0])

    @cached_property
    def _words(self) -> Any:
        texts = [sample.text for sample in self.samples]
        return vectorizer(2).fit([*texts, *(title for case in self.cases for title in _titles(case.text))])

    @cached_property
    def _without_own(self) -> Any:
        return self._fit(False)

    @cached_property
    def _with_own(self) -> Any:
        return self._fit(True)

    def _fit(self, own: bool) -> Any:
        """Each question is learned from as it is and with the candidates swapped: their order tells nothing."""
        from scipy.sparse import vstack

        features, answers = self._features(self.cases, own), [case.answer for case in self.cases]
        swapped = ["[2]" if answer == "[1]" else "[1]" for answer in answers]
        model = sklearn_parts().linear_model.LogisticRegression(fit_intercept=False, max_iter=300)
        return model.fit(vstack([features, -features]), answers + swapped)

    def _features(self, cases: Sequence[Case], own: bool) -> Any:
        """[C, words + likenesses]: those of the first candidate minus those of the second."""
        from scipy.sparse import csr_matrix, hstack

        first, second = (self._words.transform([_titles(case.text)[n] for case in cases]) for n in (0, 1))
        asked = self._words.transform([case.text.partition('", ')[0] for case in cases])
        likeness = [np.asarray(asked.multiply(first - second).sum(-1)).reshape(-1)]
        if own:
            known = [self._words.transform([sample.text for sample in case.own] or [""]) for case in cases]
            pairs = [(k @ first[n].T, k @ second[n].T) for n, k in enumerate(known)]
            likeness.append(np.asarray([a.max() - b.max() for a, b in pairs]))
            likeness.append(np.asarray([a.mean() - b.mean() for a, b in pairs]))
        return hstack([first - second, csr_matrix(self.scale * np.stack(likeness, axis=1))]).tocsr()


def _titles(question: str) -> tuple[str, str]:
    return candidates(question) or ("", "")


class TextFloor(Floor):
    """Written answers: the question's own text, whole or cut to as many words as answers have.

    Which of the two, for `words` and `words+own`, is decided on the training users' questions by ROUGE-1.
    """

    def __init__(self, task: TaskManifest, samples: Sequence[Sample], cases: Sequence[Case]) -> None:
        super().__init__(task, samples, cases)
        self._length = statistics.median(len(words_of(sample.answer)) for sample in samples)

    @cached_property
    def _whole(self) -> bool:
        score, cases = rouge("rouge1"), self.cases[:MAX_ROUGE_CASES]
        cut = sum(score(case.answer, _cut(case.text, self._length)) for case in cases)
        return sum(score(case.answer, case.text) for case in cases) > cut

    def own_habit(self, case: Case) -> str:
        """As many words as the user's median answer."""
        own = [len(words_of(sample.answer)) for sample in case.own]
        return _cut(case.text, statistics.median(own) if own else self._length)

    def words(self, case: Case) -> str:
        """All words, or as many as everybody's median answer."""
        return case.text if self._whole else _cut(case.text, self._length)

    def words_and_own(self, case: Case) -> str:
        """All words, or as many as lie between the two, nearer to the user's the longer the history."""
        own = [len(words_of(sample.answer)) for sample in case.own]
        if self._whole or not own:
            return self.words(case)
        return _cut(case.text, (len(own) * statistics.median(own) + self._length) / (len(own) + 1))


def _cut(text: str, num_words: float) -> str:
    return " ".join(words_of(text)[: max(1, round(num_words))])
