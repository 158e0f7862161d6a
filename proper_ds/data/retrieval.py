"""Which of a user's earlier history items are shown in a prompt: by BM25, the newest, or random ones.

`prompt_maker.py` asks; a searcher holds the items of one user and one task, and knows nothing of anybody else.
Shapes: I items.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import bm25s
import numpy as np

from proper_ds.data.records import HistoryItem

if TYPE_CHECKING:
    from proper_ds.data.recipe import PromptRecipe

K1, B = 1.5, 0.75
METHOD = "lucene"
"""idf = log(1 + (I - df + 0.5) / (df + 0.5)). LaMP's package (rank_bm25) lacks the `1 +` and lifts negative values to a
quarter of the mean idf, under which words shared by half of a short history count nothing or against an item."""
_DIGITS = 9
"""Scores that agree to so many digits are ties, which the newest wins."""


def search_text(item: HistoryItem) -> str:
    """What of an item is searched: LaMP's corpus text."""
    return item.retrieval or item.text


class EarlierItems:
    """BM25 over a growing list of items: document frequencies and mean length are those of the items added so far.

    The scores are those of bm25s, whose index holds finished scores and would have to be made anew for each item.
    """

    def __init__(self) -> None:
        self._items_of: dict[str, array[int]] = {}
        self._counts_of: dict[str, array[int]] = {}
        self._lengths: array[int] = array("q")

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, words: Sequence[str]) -> None:
        """The next item."""
        for word, count in Counter(words).items():
            self._items_of.setdefault(word, array("q")).append(len(self._lengths))
            self._counts_of.setdefault(word, array("q")).append(count)
        self._lengths.append(len(words))

    def scores(self, query: Sequence[str]) -> np.ndarray:
        """The score [I] of each item; a word that the query repeats counts as often."""
        length_I = np.frombuffer(self._lengths, dtype=np.int64)
        found_I = np.zeros(len(length_I))
        if not length_I.sum():
            return found_I
        norm_I = K1 * (1 - B + B * length_I / length_I.mean())
        for word, repeats in Counter(query).items():
            if word in self._items_of:
                items, count = (np.frombuffer(held[word], dtype=np.int64) for held in (self._items_of, self._counts_of))
                idf = math.log(1 + (len(length_I) - len(items) + 0.5) / (len(items) + 0.5))
                found_I[items] += repeats * idf * count / (norm_I[items] + count)
        return found_I


def whole_scores(index: bm25s.BM25 | None, num_items: int, query: Sequence[str]) -> np.ndarray:
    """The score [I] of each item in an index of a whole history; None stands for one without a word."""
    known = [word for word in query if index is not None and word in index.vocab_dict]
    if index is None or not known:
        return np.zeros(num_items)
    found: np.ndarray = index.get_scores(known)
    return found


def whole_index(documents: list[list[str]]) -> bm25s.BM25 | None:
    """bm25s over all items of a user; None where they have no word."""
    if not any(documents):
        return None
    index = bm25s.BM25(k1=K1, b=B, method=METHOD, dtype="float64")
    index.index(documents, create_empty_token=False, show_progress=False)
    return index


def best(score_I: np.ndarray, count: int) -> list[int]:
    """The `count` items of the highest score, best first; among equals the newest."""
    newest_first_I = -np.round(score_I[::-1], _DIGITS)
    order = len(score_I) - 1 - np.argsort(newest_first_I, kind="stable")
    return [int(n) for n in order[:count]]


class Searcher:
    """Retrieves from one user's items of one task, oldest first: from those before one of them, or from all."""

    def __init__(self, recipe: PromptRecipe, items: Sequence[HistoryItem]) -> None:
        self._retriever, self._count = recipe.retriever, recipe.num_retrieved
        self._items = items
        self._documents: list[list[str]] = []
        if self._retriever == "bm25":
            self._documents = [search_text(item).split() for item in items]
        self._earlier = EarlierItems()
        self._whole: bm25s.BM25 | None = None
        self._is_indexed = False

    def before(self, stop: int, query: str, seed: int) -> list[HistoryItem]:
        """Items among the first `stop`, the most fitting first."""
        if self._retriever != "bm25":
            return self._unsearched(stop, seed)
        if len(self._earlier) > stop:
            self._earlier = EarlierItems()
        while len(self._earlier) < stop:
            self._earlier.add(self._documents[len(self._earlier)])
        return [self._items[n] for n in best(self._earlier.scores(query.split()), self._count)]

    def among_all(self, query: str, seed: int) -> list[HistoryItem]:
        """Items among all, the most fitting first."""
        if self._retriever != "bm25":
            return self._unsearched(len(self._items), seed)
        if not self._is_indexed:
            self._whole, self._is_indexed = whole_index(self._documents), True
        scores = whole_scores(self._whole, len(self._items), query.split())
        return [self._items[n] for n in best(scores, self._count)]

    def _unsearched(self, stop: int, seed: int) -> list[HistoryItem]:
        """The newest items, newest first, or random ones without replacement (LaMP draws with replacement)."""
        count = min(self._count, stop)
        if self._retriever == "recency":
            return [self._items[n] for n in range(stop - 1, stop - 1 - count, -1)]
        if not stop:
            return []
        return [self._items[int(n)] for n in np.random.default_rng(seed).choice(stop, count, replace=False)]
