"""The leak guard: finds questions whose own item stands in the same user's history."""

from __future__ import annotations

from collections.abc import Iterable

from proper_ds.data.records import HistoryItem
from proper_ds.data.tasks import Task, candidates, query_text

MIN_TEXT_WORDS = 4
"""From here on an answer of a generic task is taken for text."""


def squeezed(text: str) -> str:
    """Text as the guard compares it: case and white space do not matter."""
    return " ".join(text.casefold().split())


class LeakGuard:
    """Compares one user's questions with that user's history.

    A question leaks when a history item of its task has the same input text, or, for text answers, the same answer.
    LaMP-1 names one of the user's own titles by design; there, a candidate that is a title of the history leaks.
    Short answers of a generic task may be labels, which recur by nature: they are not compared.
    """

    def __init__(self, items: Iterable[tuple[HistoryItem, frozenset[str]]]) -> None:
        """Takes (item, splits in whose profiles it stood) pairs."""
        self._texts: dict[tuple[str, str], set[str]] = {}
        self._answers: dict[tuple[str, str], set[str]] = {}
        for item, splits in items:
            if item.text:
                self._texts.setdefault((item.task, squeezed(item.text)), set()).update(splits)
            self._answers.setdefault((item.task, squeezed(item.answer)), set()).update(splits)

    def find(self, task: Task, instruction: str, question: str, answer: str | None) -> tuple[str, set[str]] | None:
        """(what leaks, splits of the profiles it stands in), or None."""
        if task.lamp_id == "LaMP_1":
            for title in candidates(question) or ():
                splits = self._texts.get((task.name, squeezed(title)))
                if splits:
                    return f"candidate title {title[:60]!r} is in the user's history", splits
            return None
        text = squeezed(query_text(task, question, instruction))
        splits = self._texts.get((task.name, text))
        if splits:
            return "the same input text is in the user's history", splits
        is_label = task.lamp_id == "generic" and answer is not None and len(answer.split()) < MIN_TEXT_WORDS
        if task.kind == "generation" and answer and not is_label:
            splits = self._answers.get((task.name, squeezed(answer)))
            if splits:
                return "the same answer is in the user's history", splits
        return None
