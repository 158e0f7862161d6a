"""Methods without a language model: the floor under every claim. A driver stage calls `predict_floors`.

`own-habit` knows the user's own history and no words of the question; `words` is a linear bag of words that knows no
user; `words+own` is both. What each does for a kind of task stands in `floor_linear.py` and `floor_texts.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import pyarrow as pa

from proper_ds.data.manifest import TaskManifest
from proper_ds.data.prepared import PreparedData
from proper_ds.data.records import User
from proper_ds.errors import DataError
from proper_ds.evaluation.answers import SCHEMA
from proper_ds.evaluation.floor_base import Case, Floor, Sample
from proper_ds.evaluation.floor_linear import ClassFloor, RatingFloor
from proper_ds.evaluation.floor_texts import ChoiceFloor, TextFloor
from proper_ds.evaluation.methods import FLOORS
from proper_ds.files import seed_of

ROWS_AT_ONCE = 1_000
"""Answers that are held as Python objects, by method."""
_KINDS: dict[str, type[Floor]] = {"classification": ClassFloor, "ordinal": RatingFloor, "generation": TextFloor}
Made = TypeVar("Made")


def predict_floors(
    prepared: PreparedData, split: str, train_split: str, methods: Sequence[str], seed: int, max_examples: int
) -> pa.Table:
    """Answers of the floors to all questions of `split`, in the columns of `answers.SCHEMA`.

    Only training users are learned from (`User.teaches`), and of an answered user only that user's own history.

    Args:
        methods: names out of FLOORS.
        max_examples: of each task, learn from so many examples at most, drawn at random.

    Raises:
        DataError: where scikit-learn is missing, or a task has no examples to learn from.
    """
    assert set(methods) <= set(FLOORS), methods
    parts: dict[str, list[pa.Table]] = {method: [] for method in methods}
    rows: dict[str, list[dict[str, object]]] = {method: [] for method in methods}

    def gather(method: str) -> None:
        parts[method].append(pa.Table.from_pylist(rows[method], schema=SCHEMA))
        rows[method] = []

    for task in prepared.manifest.tasks.values():
        floor = _fitted(task, prepared, train_split, seed, max_examples)
        for index, user in enumerate(prepared.users()):
            own = _own_samples(task, user)
            for query in user.queries:
                if query.split != split or query.task != task.name:
                    continue
                case = Case(own, question_text(task, query.input), answer="")
                for method in methods:
                    rows[method].append(
                        {
                            "method": method,
                            "user": index,
                            "task": task.name,
                            "id": query.id,
                            "gold": query.answer,
                            "prediction": floor.answer(method, case),
                            "num_history": len(user.history),
                            "personal": method != "words" and bool(own),
                            "scores": [],
                            "gates": [],
                            "num_experts": 0,
                        }
                    )
                    if len(rows[method]) == ROWS_AT_ONCE:
                        gather(method)
    for method in methods:
        gather(method)
    return pa.concat_tables(part for method in methods for part in parts[method])  # in order, as other predictions


def question_text(task: TaskManifest, question: str) -> str:
    """A question without the instruction that all questions of the task share."""
    return question.removeprefix(task.instruction)


def is_fitted(task: TaskManifest, methods: Sequence[str]) -> bool:
    """Whether a floor of `methods` learns its answers to a task's questions, by scikit-learn."""
    return bool({"words", "words+own"} & set(methods)) and _kind_of(task) is not TextFloor


def _kind_of(task: TaskManifest) -> type[Floor]:
    return ChoiceFloor if task.lamp_id == "LaMP_1" else _KINDS[task.kind]


def _fitted(task: TaskManifest, prepared: PreparedData, train_split: str, seed: int, max_examples: int) -> Floor:
    kind = _kind_of(task)
    samples = _drawn(_samples(task, prepared, train_split), max_examples, seed_of("floor samples", task.name, seed))
    cases = _drawn(_cases(task, prepared, train_split), max_examples, seed_of("floor cases", task.name, seed))
    if not samples or (kind is ChoiceFloor and not cases):
        raise DataError(
            f"task {task.name}: training users ({train_split!r}) have no examples that a floor can be fitted to;"
            " name another data.train_split, or leave the floors out of evaluation.methods"
        )
    return kind(task, samples, cases)


def _taught(prepared: PreparedData, train_split: str) -> Iterator[User]:
    return (user for user in prepared.users() if user.teaches(train_split))


def _own_samples(task: TaskManifest, user: User) -> list[Sample]:
    return [Sample(user.key, item.text, item.answer) for item in user.history if item.task == task.name]


def _samples(task: TaskManifest, prepared: PreparedData, train_split: str) -> Iterator[Sample]:
    """What the bag of words learns from: history items and answered questions alike."""
    for user in _taught(prepared, train_split):
        yield from _own_samples(task, user)
        for query in user.queries:
            if query.split == train_split and query.task == task.name and query.answer is not None:
                yield Sample(user.key, question_text(task, query.input), query.answer)


def _cases(task: TaskManifest, prepared: PreparedData, train_split: str) -> Iterator[Case]:
    """Answered questions with their user's whole history: what the weight of the user's own side is chosen on."""
    for user in _taught(prepared, train_split):
        own = _own_samples(task, user)
        for query in user.queries:
            if query.split == train_split and query.task == task.name and query.answer is not None:
                yield Case(own, question_text(task, query.input), query.answer)


def _drawn(items: Iterator[Made], limit: int, seed: int) -> list[Made]:
    """At most `limit` items, each as likely as any other (reservoir sampling)."""
    generator = np.random.default_rng(seed)
    kept: list[Made] = []
    for number, item in enumerate(items):
        if number < limit:
            kept.append(item)
        elif (place := int(generator.integers(number + 1))) < limit:
            kept[place] = item
    return kept
