"""All methods' answers to the same questions, put in order: what `results.py`, `verify.py` and studies score.

The files are those of `answers.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from proper_ds.evaluation.answers import answer_files

PREDICTIONS = "predictions"
"""The folder of a run's predictions."""
SCORED = ["method", "user", "task", "id", "gold", "prediction", "num_history"]
"""The columns that scores are computed from."""


@dataclass(frozen=True)
class Answers:
    """All answers to one task's questions with known golds, in columns, ordered by user and question.

    Attributes:
        users: index of the user of each question.
        history: history items of that user.
        predictions: by method, in the order of the questions.
    """

    ids: list[str]
    users: np.ndarray
    history: np.ndarray
    golds: list[str]
    predictions: dict[str, list[str]]


def prediction_files(root: Path, methods: Sequence[str]) -> list[Path]:
    """All files of the methods' answers of the run in `root`, in a fixed order."""
    return [path for method in methods for path in answer_files(root / PREDICTIONS / method)]


def read_predictions(root: Path, methods: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
    """The methods' answers of the run in `root` as one table, in a fixed order; all columns, or the given ones."""
    return pa.concat_tables(pq.read_table(path, columns=columns) for path in prediction_files(root, methods))


def answers_of(table: pa.Table, task: str, methods: Sequence[str]) -> Answers:
    """The scored answers of one task, by those of the methods that answered it; a method answers all or nothing."""
    scored = table.select(SCORED).filter((pc.field("task") == task) & pc.field("gold").is_valid())
    parts = {}
    for method in methods:
        part = scored.filter(pc.field("method") == method)
        if len(part):
            parts[method] = part.sort_by([("user", "ascending"), ("id", "ascending")])
    if not parts:
        return Answers([], np.zeros(0, np.int64), np.zeros(0, np.int64), [], {})
    name, first = next(iter(parts.items()))
    for method, part in parts.items():
        same = all(part.column(key).equals(first.column(key)) for key in ("user", "id", "gold"))
        assert same, f"{method} did not answer the same questions of {task} as {name}"
    return Answers(
        first.column("id").to_pylist(),
        first.column("user").to_numpy().astype(np.int64),
        first.column("num_history").to_numpy().astype(np.int64),
        first.column("gold").to_pylist(),
        {method: part.column("prediction").to_pylist() for method, part in parts.items()},
    )
