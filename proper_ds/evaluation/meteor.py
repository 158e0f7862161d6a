"""METEOR as LongLaMP reports it, but without synonyms: exact matches, then matches of stems.

The synonym stage of the published metric needs WordNet, a separate download; a score that depended on whether a
machine has it could not be compared. So it is left out everywhere, and `metrics.py` calls the metric `meteor-stem`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

ALPHA, BETA, GAMMA = 0.9, 3.0, 0.5
"""Weights of Hugging Face's metric: precision against recall, and the penalty for scattered matches."""


class _NoSynonyms:
    """Stands where nltk asks WordNet."""

    def synsets(self, word: str) -> list[Any]:
        return []


@cache
def _tools() -> tuple[Any, Any]:
    from nltk.stem.porter import PorterStemmer
    from nltk.tokenize import NLTKWordTokenizer

    return NLTKWordTokenizer(), PorterStemmer()


def meteor(gold: str, given: str) -> float:
    """The score in [0, 1] of one answer; words are split as in the Penn treebank, and case does not matter."""
    from nltk.translate.meteor_score import single_meteor_score

    tokenizer, stemmer = _tools()
    return float(
        single_meteor_score(
            tokenizer.tokenize(gold),
            tokenizer.tokenize(given),
            stemmer=stemmer,
            wordnet=_NoSynonyms(),
            alpha=ALPHA,
            beta=BETA,
            gamma=GAMMA,
        )
    )
