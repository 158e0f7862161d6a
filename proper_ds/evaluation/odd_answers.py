"""Predictions that say nothing that their task knows: counted and shown, while the metrics stay the official ones.

`score_files.py` asks: a score alone does not tell answers that are wrong from answers in another form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from proper_ds.data.tasks import Task
from proper_ds.evaluation.metrics import rating_of, scale_of

NUM_SHOWN, LONGEST_SHOWN = 5, 40


@dataclass(frozen=True)
class Odd:
    """Predictions of one task that are odd in one way.

    Attributes:
        what: "no number", ...
        counts_as: what the metrics make of them.
        examples: a few different ones.
    """

    what: str
    counts_as: str
    num: int
    num_predictions: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        """One line for people."""
        shown = ", ".join(repr(_short(text)) for text in self.examples)
        num = f"{self.num:,} of {self.num_predictions:,} predictions {'is' if self.num == 1 else 'are'}"
        return f"{num} {self.what}, counted {self.counts_as}: {shown}"


def odd_answers(task: Task, predictions: Iterable[str]) -> list[Odd]:
    """The odd ones among a task's predictions, by what is odd; none of tasks with open answers."""
    given = [text.strip() for text in predictions]
    if task.labels is None:
        return []
    if task.kind != "ordinal":
        labels = set(task.labels)
        return _those("outside the label set", "as wrong", given, lambda text: text not in labels)
    lowest, highest = scale_of(task.labels)
    farther = f"as {lowest:g} or {highest:g}, whichever is farther from the gold"

    def is_beyond(text: str) -> bool:
        rating = rating_of(text)
        return rating is not None and not lowest <= rating <= highest

    return [
        *_those("no number", farther, given, lambda x: rating_of(x) is None),
        *_those(f"outside {lowest:g} to {highest:g}", "at face value", given, is_beyond),
    ]


def _those(what: str, counts_as: str, given: list[str], is_odd: Callable[[str], bool]) -> list[Odd]:
    odd = [text for text in given if is_odd(text)]
    examples = tuple(dict.fromkeys(odd))[:NUM_SHOWN]
    return [Odd(what, counts_as, len(odd), len(given), examples)] if odd else []


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + ".."
