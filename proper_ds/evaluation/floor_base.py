"""What every floor is: a question with its user's own history goes in, an answer comes out; `floors.py` calls them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from proper_ds.data.manifest import TaskManifest
from proper_ds.errors import DataError

MAX_FEATURES = 100_000


@dataclass(frozen=True)
class Sample:
    """One answered text of one user."""

    user: str
    text: str
    answer: str


@dataclass(frozen=True)
class Case:
    """One question with its user's own history, oldest first; `answer` is not looked at in answering."""

    own: list[Sample]
    text: str
    answer: str


def sklearn_parts() -> Any:
    """The parts of scikit-learn that floors use. Raises DataError where it is not installed."""
    try:
        import sklearn.feature_extraction.text
        import sklearn.linear_model
    except ImportError:
        raise DataError(
            "the floors `words`, `words+own` need scikit-learn: `pip install scikit-learn`, or take them out of"
            " evaluation.methods"
        ) from None
    return sklearn


def vectorizer(longest_run: int) -> Any:
    """Words and runs of up to so many words, weighted by how rare they are."""
    return sklearn_parts().feature_extraction.text.TfidfVectorizer(
        ngram_range=(1, longest_run), sublinear_tf=True, max_features=MAX_FEATURES, token_pattern=r"\b\w+\b"
    )


def words_of(text: str) -> list[str]:
    """The words of a text where they are counted or cut."""
    return text.split()


class Floor(ABC):
    """The floors of one task, fitted."""

    def __init__(self, task: TaskManifest, samples: Sequence[Sample], cases: Sequence[Case]) -> None:
        self.task, self.samples, self.cases = task, samples, cases

    def answer(self, method: str, case: Case) -> str:
        """The answer of `own-habit`, `words` or `words+own`."""
        return {"own-habit": self.own_habit, "words": self.words, "words+own": self.words_and_own}[method](case)

    @abstractmethod
    def own_habit(self, case: Case) -> str:
        """From the user's own history alone; of the training users' where there is none."""

    @abstractmethod
    def words(self, case: Case) -> str:
        """From the question's words alone."""

    @abstractmethod
    def words_and_own(self, case: Case) -> str:
        """From both."""
