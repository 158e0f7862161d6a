"""The built-in profile says what was counted, from the items before one alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from proper_ds.data.background import Background, TaskBackground, item_words
from proper_ds.data.manifest import TaskManifest
from proper_ds.data.profile_text import PRIOR, Summary, _evidence
from proper_ds.data.records import HistoryItem, Query, User
from proper_ds.data.tasks import TASKS


def summary(name, pairs, background=None):
    items = [HistoryItem(str(n), name, 0, text, answer) for n, (text, answer) in enumerate(pairs)]
    task = TaskManifest.of(TASKS[name], TASKS[name].instruction, False)
    return Summary(task, items, background or TaskBackground({}, 0))


def test_labels_are_counted():
    found = summary("LaMP_2N", [("one", "sports"), ("two", "crime"), ("three", "sports"), ("four", "politics")])
    assert found.before(0) == ""
    assert found.before(1) == "About this person: most frequent categories: sports (1 of 1)."
    assert found.before(4) == (
        "About this person: most frequent categories: sports (2 of 4), crime (1 of 4), politics (1 of 4)."
    )


def test_scores_have_a_median_a_mean_and_words_for_both_sides():
    films = [("drama alpha", "5"), ("comedy beta", "1"), ("drama gamma", "4"), ("comedy delta", "2")] * 3
    found = summary("LaMP_3", films).before(12)
    assert found == (
        "About this person: median of scores 3, mean 3.0; most frequent: 1 (3 of 12), 2 (3 of 12), 4 (3 of 12);"
        " high for drama, alpha, gamma; low for comedy, beta, delta."
    )
    assert summary("LaMP_3", [("some film", "4")]).before(1) == (
        "About this person: median of scores 4, mean 4.0; most frequent: 4 (1 of 1)."
    )


def test_words_are_typical_against_the_background():
    background = TaskBackground({"the": 900, "parser": 5, "common": 90}, 1000)
    texts = [("the parser common", "a b c")] * 4
    found = summary("LaMP_5", texts, background).before(4)
    assert found == "About this person: titles of about 3 words; typical words: parser."
    assert summary("LaMP_1", texts, background).before(4) == "About this person: typical topics: parser."


def test_evidence_is_the_log_odds_ratio_with_a_dirichlet_prior():
    one, two, background = (3, 2), (40, 1), (400, 5)
    prior = [PRIOR * count / 1000 for count in background]

    def z(w):
        def log_odds(y, total):
            return math.log((y + prior[w]) / (total + PRIOR - y - prior[w]))

        difference = log_odds(one[w], sum(one)) - log_odds(two[w], sum(two))
        return difference / math.sqrt(1 / (one[w] + prior[w]) + 1 / (two[w] + prior[w]))

    found = _evidence(np.asarray(one, dtype=float), np.asarray(two, dtype=float), np.asarray(prior))
    assert found == pytest.approx([z(0), z(1)], rel=1e-12)


def test_the_order_of_calls_changes_nothing():
    pairs = [("film drama noir", str(1 + n % 5)) for n in range(8)]
    once = summary("LaMP_3", pairs)
    assert [once.before(n) for n in (8, 3, 5, 0, 8)] == [summary("LaMP_3", pairs).before(n) for n in (8, 3, 5, 0, 8)]


def test_words_are_counted_once_an_item_and_those_of_one_user_or_too_rare_are_left_out(monkeypatch):
    item = HistoryItem("1", "t", 0, "It is IT: a Film, film2 2films, the film's end", "x")
    assert item_words(item) == ["film", "film2", "the", "end"]

    def user(key, *texts):
        return User(key, [HistoryItem("", "t", 0, text, "x") for text in texts])

    users = [user("a", "film", "film noir", "noir film"), user("b", "rare film noir"), user("c", "rare", "own")]
    asked = user("d", "secret film")
    asked.queries.append(Query("q", "dev", "t", "?", None))
    found = Background.count([*users, asked], "train").of("t")
    assert found == TaskBackground({"film": 4, "noir": 3, "rare": 2}, 10), "`own` is one user's, d is asked for dev"
    monkeypatch.setattr("proper_ds.data.background.MAX_WORDS", 2)
    assert Background.count(users, "train").of("t") == TaskBackground({"film": 4, "noir": 3}, 10)
    monkeypatch.setattr("proper_ds.data.background._PRUNE_AT", 2)
    assert Background.count(users, "train").of("t") == TaskBackground({"film": 4, "noir": 3}, 10)
