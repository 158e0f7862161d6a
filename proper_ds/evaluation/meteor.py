"""METEOR as LongLaMP reports it, but without synonyms: exact matches, then matches of stems.

The synonym stage of the published metric needs WordNet, a separate download; a score that depended on whether a
machine has it could not be compared. So it is left out everywhere, and `metrics.py` calls the metric `meteor-stem`.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

ALPHA, BETA, GAMMA = 0.9, 3.0, 0.5
"""Weights of Hugging Face's metric: precision against recall, and the penalty for scattered matches."""


_NO_END = "".join(
    rf"(?<!\b{word}\.)" for word in ("[A-Z]", "al", "Mr", "Ms", "Dr", "vs", "Mrs", "Fig", r"e\.g", r"i\.e")
)
_SENTENCE_END = re.compile(rf"""(?:{_NO_END}(?<=[.!?])|(?<=[.!?]["')\]]))\s+(?=["'(\[]*[A-Z0-9])""")
"""Where one sentence ends and another begins; close to nltk's Punkt, whose model is a download."""


class _NoSynonyms:
    """Stands where nltk asks WordNet."""

    def synsets(self, word: str) -> list[Any]:
        return []


@cache
def _tools() -> tuple[Any, Any]:
    from nltk.stem.porter import PorterStemmer
    from nltk.tokenize import NLTKWordTokenizer

    return NLTKWordTokenizer(), PorterStemmer()


def words_of(text: str) -> list[str]:
    """The words of a text as in the Penn treebank, sentence by sentence: else only its last full stop would be parted
    from the word before it."""
    tokenizer, _ = _tools()
    return [word for sentence in _SENTENCE_END.split(text) for word in tokenizer.tokenize(sentence)]


def meteor(gold: str, given: str) -> float:
    """The score in [0, 1] of one answer, over all its sentences; case does not matter."""
    from nltk.translate.meteor_score import single_meteor_score

    _, stemmer = _tools()
    return float(
        single_meteor_score(
            words_of(gold),
            words_of(given),
            stemmer=stemmer,
            wordnet=_NoSynonyms(),
            alpha=ALPHA,
            beta=BETA,
            gamma=GAMMA,
        )
    )
