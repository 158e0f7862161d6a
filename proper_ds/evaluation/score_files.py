"""`proper-ds evaluate`: scores prediction files of anybody's making against gold files, by LaMP's definitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from proper_ds.data.files import stem_of
from proper_ds.data.manifest import TaskManifest
from proper_ds.data.readers import read_lamp_questions
from proper_ds.data.sources import read_info
from proper_ds.data.tasks import TASKS, Task, with_info
from proper_ds.errors import DataError
from proper_ds.evaluation.answer_files import AnswerFile, check_same_ids, read_answers
from proper_ds.evaluation.answer_pairs import pairs_of
from proper_ds.evaluation.metrics import metrics_of
from proper_ds.evaluation.odd_answers import Odd, odd_answers


@dataclass(frozen=True)
class TaskScore:
    """One task's scores.

    Attributes:
        num_users: None where nothing says who asked.
        values: by metric, over all questions: the official value.
        user_means: by metric, the mean of users' own values; empty where users are not known.
        odd: predictions that are no legal answer of the task; they are scored as the official definitions have it.
    """

    task: str
    predictions: str
    golds: str
    num_questions: int
    num_users: int | None
    values: dict[str, float]
    user_means: dict[str, float]
    odd: list[Odd]


def score_files(
    predictions: Path,
    golds: Path,
    task: str | None = None,
    labels: Sequence[str] | None = None,
    questions: Path | None = None,
) -> list[TaskScore]:
    """Scores of every task in `predictions`.

    Args:
        task: which task to score where the files hold several, which form a `LaMP_2` has (LaMP_2M, LaMP_2N), or what
            the task is where the files do not say, or by a name that is not LaMP's.
        labels: the label set in place of the task's own or that of an info.json beside the golds.
        questions: the questions, which say who asked; by default `X_questions.json[.gz]` beside a gold `X_outputs`.

    Raises:
        DataError: for files that cannot be read, of different tasks, with missing, other or repeated ids, and for
            golds that are not legal answers of the task.
    """
    scores = []
    for given, gold, name in pairs_of(read_answers(predictions), read_answers(golds), predictions, golds, task):
        check_same_ids(given, gold)
        scores.append(_score(given, gold, _task_of(gold, name, labels), questions))
    return scores


def _task_of(golds: AnswerFile, name: str, labels: Sequence[str] | None) -> Task:
    info = read_info(golds.path.parent / "info.json")
    if labels is not None:
        info = info | {"labels": list(labels)}
    task = TASKS[name] if name in TASKS else _movies_or_news(golds)
    task = with_info(task, {key: info[key] for key in ("name", "labels") if key in info}, golds.source)
    if task.labels is not None:
        strange = sorted({answer.strip() for answer in golds.answers.values()} - set(task.labels))
        if strange:
            mend = "Give all of them with --labels, or say which task it is with --task."
            raise DataError(f"{golds.source}: golds {', '.join(strange[:5])} are no labels of {task.name}. {mend}")
    return task


def _movies_or_news(golds: AnswerFile) -> Task:
    """LaMP used one id for two tasks; the golds tell which labels are meant."""
    found = {answer.strip() for answer in golds.answers.values()}
    news = TASKS["LaMP_2N"]
    return news if found <= set(news.labels or ()) else TASKS["LaMP_2M"]


def _score(given: AnswerFile, golds: AnswerFile, task: Task, questions: Path | None) -> TaskScore:
    ids = list(golds.answers)
    users = _users_of(golds, ids, questions)
    values, means = {}, {}
    for metric in metrics_of(TaskManifest.of(task, "", generated=False)):
        statistics = np.stack([metric.statistics(golds.answers[key], given.answers[key]) for key in ids])
        values[metric.name] = float(metric.value(statistics.sum(0)))
        if users is not None:
            sums = np.zeros((users.max() + 1, statistics.shape[1]))
            np.add.at(sums, users, statistics)
            means[metric.name] = float(np.mean(metric.user_value(sums)))
    num_users = None if users is None else int(users.max()) + 1
    odd = odd_answers(task, (given.answers[key] for key in ids))
    return TaskScore(task.name, given.source, golds.source, len(ids), num_users, values, means, odd)


def _users_of(golds: AnswerFile, ids: list[str], questions: Path | None) -> np.ndarray | None:
    """The user of each question as a number, or None where no questions file is there."""
    path = questions or _questions_beside(golds.path)
    if path is None:
        return None
    complaints: list[Any] = []
    users = {q.id: q.user for q in read_lamp_questions(path, "", complaints.append)}
    if complaints:
        raise DataError(f"{path}: {complaints[0]}")
    unknown = [key for key in ids if key not in users]
    if unknown:
        raise DataError(f"{path} lacks {len(unknown)} questions of {golds.source}, such as {unknown[0]!r}")
    return np.unique([users[key] for key in ids], return_inverse=True)[1]


def _questions_beside(golds: Path) -> Path | None:
    stem = stem_of(golds)
    if not stem.endswith("_outputs"):
        return None
    for ending in (".json", ".json.gz"):
        path = golds.with_name(stem.removesuffix("_outputs") + "_questions" + ending)
        if path.exists():
            return path
    return None


def as_json(scores: Sequence[TaskScore]) -> dict[str, Any]:
    """What `--json` writes."""
    return {
        "tasks": {
            score.task: {
                "predictions": score.predictions,
                "golds": score.golds,
                "num_questions": score.num_questions,
                "num_users": score.num_users,
                "metrics": {
                    name: {"value": value, "user_mean": score.user_means.get(name)}
                    for name, value in score.values.items()
                },
                "odd_predictions": {
                    odd.what: {"num": odd.num, "counted": odd.counts_as, "examples": list(odd.examples)}
                    for odd in score.odd
                },
            }
            for score in scores
        }
    }
