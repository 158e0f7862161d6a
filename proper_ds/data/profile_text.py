"""The built-in profile: what a user's earlier items say when they are counted, as a short text.

Most frequent labels or typical scores, and characteristic words by the log-odds ratio with an informative Dirichlet
prior (Monroe, Colaresi and Quinn 2008, "Fightin' Words"). `prompt_maker.py` asks for it.

With y_w the items of a side that hold word w, n = sum_w y_w, and the prior a_w = PRIOR b_w / sum b from the
background's counts b_w (half an item for a word it lacks), the evidence that w marks side 1 against side 2 is

    z_w = (log(o1_w) - log(o2_w)) / sqrt(1 / (y1_w + a_w) + 1 / (y2_w + a_w)),
    oi_w = (yi_w + a_w) / (ni + PRIOR - yi_w - a_w).

Side 1 is the user and side 2 the background; for ratings, the items scored above the user's mean against those below.
Shapes: W words of a user, S sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from proper_ds.data.background import TaskBackground, item_words
from proper_ds.data.forms import FORMS
from proper_ds.data.manifest import TaskManifest
from proper_ds.data.records import HistoryItem

PRIOR = 50.0
NUM_LABELS, NUM_WORDS = 3, 6
MIN_TOTAL = 100
"""The background counts as no smaller, so that next to nothing is no strong prior."""
MIN_ITEMS = 2
"""A word of one item alone is chance."""
MIN_Z_OWN, MIN_Z_SCORES = 1.96, 1.0
"""Against everybody, 5 % two-sided; between a user's own items, where there are few, one standard deviation."""


class Summary:
    """Counts one user's items of one task as they come, oldest first."""

    def __init__(self, task: TaskManifest, items: Sequence[HistoryItem], background: TaskBackground) -> None:
        self._task, self._items = task, items
        self._what = FORMS[task.form].what
        words = [item_words(item) for item in items]
        self._words = list(dict.fromkeys(word for found in words for word in found))
        place = {word: n for n, word in enumerate(self._words)}
        self._words_of = [np.asarray([place[word] for word in found], dtype=np.int64) for found in words]
        self._others_W = np.asarray([background.num_items_with.get(word, 0) for word in self._words], dtype=np.float64)
        self._total = max(background.total, MIN_TOTAL)
        self._prior_W = PRIOR * np.maximum(self._others_W, 0.5) / self._total
        self._begin()

    def _begin(self) -> None:
        self._count, self._answers = 0, Counter[str]()
        self._items_by_answer: dict[str, np.ndarray] = {}
        self._lengths = 0

    def before(self, stop: int) -> str:
        """The profile from the first `stop` items; "" where they say nothing."""
        if stop < self._count:
            self._begin()
        while self._count < stop:
            self._add(self._count)
        if not stop:
            return ""
        if self._task.kind == "ordinal":
            parts = self._scores()
        elif self._task.labels is not None and not FORMS[self._task.form].into_title:
            parts = [self._labels(), self._typical("words")]
        elif FORMS[self._task.form].into_title:
            parts = [self._typical("topics")]
        else:
            parts = [f"{self._what} of about {round(self._lengths / stop)} words", self._typical("words")]
        found = "; ".join(part for part in parts if part)
        return f"About this person: {found}." if found else ""

    def _add(self, position: int) -> None:
        item = self._items[position]
        # ratings are told apart by score; elsewhere one count of words is enough
        side = item.answer if self._task.kind == "ordinal" else ""
        held_W = self._items_by_answer.setdefault(side, np.zeros(len(self._words)))
        held_W[self._words_of[position]] += 1
        self._answers[item.answer] += 1
        self._lengths += len(item.answer.split())
        self._count += 1

    def _labels(self) -> str:
        # equally frequent ones in the order of the label set, which no user decides
        order = {label: n for n, label in enumerate(self._task.labels or ())}
        ranked = sorted(self._answers.items(), key=lambda pair: (-pair[1], order[pair[0]]))[:NUM_LABELS]
        shown = ", ".join(f"{label} ({count} of {self._count})" for label, count in ranked)
        return f"most frequent {self._what}: {shown}"

    def _scores(self) -> list[str]:
        value_S = np.asarray(sorted(float(answer) for answer in self._answers))
        count_S = np.asarray([self._answers[answer] for answer in sorted(self._answers, key=float)])
        mean, median = float(value_S @ count_S / self._count), float(np.median(np.repeat(value_S, count_S)))
        commonest = sorted(self._answers, key=lambda answer: (-self._answers[answer], float(answer)))[:NUM_LABELS]
        shares = ", ".join(f"{answer} ({self._answers[answer]} of {self._count})" for answer in commonest)
        sides = [np.zeros(len(self._words)), np.zeros(len(self._words))]
        for answer, held_W in self._items_by_answer.items():
            sides[float(answer) <= mean] += held_W
        z_W = _evidence(sides[0], sides[1], self._prior_W)
        return [
            f"median of {self._what} {median:g}, mean {mean:.1f}; most frequent: {shares}",
            self._listed("high for", sides[0], z_W, MIN_Z_SCORES),
            self._listed("low for", sides[1], -z_W, MIN_Z_SCORES),
        ]

    def _typical(self, name: str) -> str:
        own_W = self._items_by_answer[""]
        z_W = _evidence(own_W, self._others_W, self._prior_W, self._total)
        return self._listed(f"typical {name}:", own_W, z_W, MIN_Z_OWN)

    def _listed(self, name: str, held_W: np.ndarray, z_W: np.ndarray, least: float) -> str:
        chosen = np.flatnonzero((held_W >= MIN_ITEMS) & (z_W >= least))
        chosen = chosen[np.argsort(-np.round(z_W[chosen], 9), kind="stable")][:NUM_WORDS]
        return f"{name} {', '.join(self._words[n] for n in chosen)}" if len(chosen) else ""


def _evidence(one_W: np.ndarray, two_W: np.ndarray, prior_W: np.ndarray, total_two: float | None = None) -> np.ndarray:
    """z_w of the module's docstring; `total_two` where side 2 has words that are not listed."""
    log_odds = []
    for held_W, total in ((one_W, one_W.sum()), (two_W, two_W.sum() if total_two is None else total_two)):
        mass_W = held_W + prior_W
        log_odds.append(np.log(mass_W) - np.log(np.maximum(total + PRIOR - mass_W, 0.5)))
    found: np.ndarray = (log_odds[0] - log_odds[1]) / np.sqrt(1 / (one_W + prior_W) + 1 / (two_W + prior_W))
    return found
