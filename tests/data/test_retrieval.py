"""BM25 over a user's earlier items equals the formula and bm25s, and never looks ahead."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper_ds.data.recipe import PromptRecipe
from proper_ds.data.records import HistoryItem
from proper_ds.data.retrieval import EarlierItems, Searcher, best, whole_index, whole_scores

DOCUMENT = st.lists(st.sampled_from("abcdefg"), max_size=8)
RETRIEVERS = ("bm25", "recency", "random")


def plain_bm25(documents, query, k1=1.5, b=0.75):
    """The textbook's formula, with the idf that Lucene has."""
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in query:
            df = sum(word in other for other in documents)
            tf = document.count(word)
            if tf:
                idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
                score += idf * tf / (tf + k1 * (1 - b + b * len(document) / mean))
        scores.append(score)
    return scores


@given(st.lists(DOCUMENT, min_size=1, max_size=8), DOCUMENT)
def test_scores_over_each_beginning_are_those_of_the_formula_and_of_bm25s(documents, query):
    earlier = EarlierItems()
    for stop, document in enumerate(documents, start=1):
        earlier.add(document)
        wanted = plain_bm25(documents[:stop], query)
        assert np.allclose(earlier.scores(query), wanted, rtol=0, atol=1e-12)
        found = whole_scores(whole_index(documents[:stop]), stop, query)
        assert np.allclose(found, wanted, rtol=0, atol=1e-12)


def test_unlike_rank_bm25_a_shared_word_counts_for_an_item_in_a_short_history():
    """rank_bm25: idf(w) = log((2 - 1 + 0.5) / 1.5) = 0 for a word of one of two items, so that nothing is found."""
    earlier = EarlierItems()
    earlier.add(["noir", "crime"])
    earlier.add(["love", "song"])
    assert best(earlier.scores(["crime"]), 1) == [0]


def test_the_best_come_first_and_the_newest_of_equals():
    assert best(np.asarray([1.0, 3.0, 1.0 + 1e-13, 0.5]), 3) == [1, 2, 0]


def items_of(texts):
    return [HistoryItem(str(n), "t", 0, text, "x", retrieval=f"{text} more") for n, text in enumerate(texts)]


@pytest.mark.parametrize("retriever", RETRIEVERS)
@given(texts=st.lists(DOCUMENT.map(" ".join), max_size=9), query=DOCUMENT.map(" ".join), seed=st.integers(0, 99))
def test_what_is_found_before_an_item_does_not_depend_on_it_or_what_follows(retriever, texts, query, seed):
    recipe, items = PromptRecipe(retriever=retriever, num_retrieved=3), items_of(texts)
    searcher = Searcher(recipe, items)
    stops = [*range(len(items)), len(items), *range(len(items), -1, -1)]
    for stop in stops:
        found = searcher.before(stop, query, seed)
        alone = Searcher(recipe, items[:stop])
        assert found == alone.before(stop, query, seed)
        assert found == alone.among_all(query, seed)
        assert len(set(found)) == len(found) == min(3, stop)


def test_recency_is_newest_first_and_random_follows_its_seed():
    items = items_of("abcdefgh")
    newest = Searcher(PromptRecipe(retriever="recency", num_retrieved=2), items)
    assert [item.text for item in newest.before(5, "", 0)] == ["e", "d"]
    drawn = Searcher(PromptRecipe(retriever="random", num_retrieved=2), items)
    assert drawn.among_all("", 1) == drawn.among_all("", 1)
    assert len({tuple(item.text for item in drawn.among_all("", seed)) for seed in range(20)}) > 5


def test_an_item_is_found_by_its_search_text():
    item = HistoryItem("1", "t", 0, "the body", "x", retrieval="headline the body")
    other = HistoryItem("2", "t", 0, "something else", "x")
    found = Searcher(PromptRecipe(retriever="bm25", num_retrieved=1), [item, other]).among_all("headline", 0)
    assert found == [item]
