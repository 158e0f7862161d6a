"""The leak guard: finds questions whose own item, or a near copy of it, stands in the same user's history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from proper_ds.data.records import HistoryItem
from proper_ds.data.tasks import CITED, Task, asked_title, candidates, query_text

MIN_TEXT_WORDS = 4
"""From here on an answer of a generic task is taken for text."""

MIN_EQUAL_WORDS = 3
"""Texts of so many words are near copies where their words are the same, whatever stands between them."""
SHINGLE_WORDS = 5
"""Near copies are found by the runs of so many words that two texts share."""
MIN_SHINGLES = 8
"""Texts with fewer runs (twelve words) must have the same words: in short ones, likeness is no sign of a copy."""
NEAR_SHARE = 0.8
"""A near copy shares at least this much of the runs of the shorter of the two texts."""

Found = tuple[Literal["same", "near"], str, set[str]]
"""Whether it is the same or a near copy, what leaks, and the splits in whose profiles that stands."""


def squeezed(text: str) -> str:
    """Text as the guard compares it: case and white space do not matter."""
    return " ".join(text.casefold().split())


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text without case; punctuation does not part them, and is no part of them."""
    words = ("".join(filter(str.isalnum, word)) for word in text.casefold().split())
    return tuple(word for word in words if word)


def shingles(text: str) -> set[int]:
    """Hashes of the runs of SHINGLE_WORDS words."""
    words = words_of(text)
    return {hash(words[n : n + SHINGLE_WORDS]) for n in range(len(words) - SHINGLE_WORDS + 1)}


class _Copies:
    """Texts of one user's history that are looked up by their words, and by the runs of words they share."""

    def __init__(self) -> None:
        self._texts: dict[tuple[str, str], set[str]] = {}
        self._by_words: dict[tuple[str, tuple[str, ...]], list[tuple[str, str]]] = {}
        self._by_run: dict[int, list[int]] | None = None
        self._sizes: list[int] = []

    def add(self, task: str, text: str, splits: Iterable[str]) -> None:
        """Keep one text."""
        key = (task, squeezed(text))
        if key not in self._texts:
            self._by_words.setdefault((task, words_of(text)), []).append(key)
        self._texts.setdefault(key, set()).update(splits)

    def same(self, task: str, text: str) -> set[str] | None:
        """The splits of the profiles that hold this very text, or None."""
        return self._texts.get((task, squeezed(text)))

    def near(self, task: str, text: str) -> tuple[str, set[str]] | None:
        """(the nearest copy, splits of the profiles that hold near copies), or None."""
        words = words_of(text)
        if len(words) >= MIN_EQUAL_WORDS and (keys := self._by_words.get((task, words))):
            return keys[0][1], set().union(*(self._texts[key] for key in keys))
        runs = shingles(text)
        if len(runs) < MIN_SHINGLES:
            return None
        if self._by_run is None:
            self._index()
        assert self._by_run is not None
        shared = Counter(position for run in runs for position in self._by_run.get(run, ()))
        texts, splits, best = list(self._texts), set[str](), ("", 0.0)
        for position, count in shared.items():
            share = count / min(len(runs), self._sizes[position])
            if texts[position][0] == task and share >= NEAR_SHARE:
                splits |= self._texts[texts[position]]
                best = max(best, (texts[position][1], share), key=lambda pair: pair[1])
        return (best[0], splits) if best[1] else None

    def _index(self) -> None:
        """Made when first asked for: most users have short texts only."""
        self._by_run = {}
        for position, (_, text) in enumerate(self._texts):
            runs = shingles(text)
            self._sizes.append(len(runs))
            if len(runs) >= MIN_SHINGLES:
                for run in runs:
                    self._by_run.setdefault(run, []).append(position)


class LeakGuard:
    """Compares one user's questions with that user's history, and with nobody else's.

    A question leaks when a history item of its task has the same input text, or, for text answers, the same answer.
    LaMP-1 names one of the user's own titles by design; there, a candidate that is a title of the history leaks, and,
    where items tell what their papers cite, a candidate that an item of the asked title cites.
    Short answers of a generic task may be labels, which recur by nature: they are not compared.
    """

    def __init__(self, items: Iterable[tuple[HistoryItem, frozenset[str]]]) -> None:
        """Takes (item, splits in whose profiles it stood) pairs."""
        self._inputs, self._answers = _Copies(), _Copies()
        self._items = list(items)
        for item, splits in self._items:
            if item.text:
                self._inputs.add(item.task, item.text, splits)
            self._answers.add(item.task, item.answer, splits)

    def find(self, task: Task, instruction: str, question: str, answer: str | None) -> Found | None:
        """What leaks, the same before near copies, or None."""
        if task.lamp_id == "LaMP_1":
            if (cited := self._cited(task, question)) is not None:
                return cited
            compared = [
                (self._inputs, title, f"candidate title {title[:60]!r}") for title in candidates(question) or ()
            ]
        else:
            compared = [(self._inputs, query_text(task, question, instruction), "input text")]
            is_label = task.lamp_id == "generic" and answer is not None and len(answer.split()) < MIN_TEXT_WORDS
            if task.kind == "generation" and answer and not is_label:
                compared.append((self._answers, answer, "answer"))
        for copies, text, what in compared:
            if splits := copies.same(task.name, text):
                the_same = what if what.startswith("candidate") else f"the same {what}"
                return "same", f"{the_same} is in the user's history", splits
        for copies, text, what in compared:
            if near := copies.near(task.name, text):
                return "near", f"a near copy of the {what} is in the user's history: {near[0][:60]!r}", near[1]
        return None

    def _cited(self, task: Task, question: str) -> Found | None:
        """A candidate of LaMP-1 that the history names as cited by the very paper of the question."""
        title, pair = words_of(asked_title(question)), [words_of(text) for text in candidates(question) or ()]
        for item, splits in self._items:
            is_citing = item.task == task.name and task.pairs[item.prompt].answer == CITED
            if is_citing and title and words_of(item.text) == title and words_of(item.answer) in pair:
                about = f"the user's history says that the paper in the question cites {item.answer[:60]!r}"
                return "same", about, set(splits)
        return None
