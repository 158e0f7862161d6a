"""Stage `prior/<level>`: whose questions a label prior is learned from, and the fit once the actors have answered them.

`pipeline/steps.py` calls both; the answers are made by `predict_job.py` as all answers are.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from proper_ds.data.prepared import PreparedData
from proper_ds.data.tokens import HISTORY, QUERY, TokenData
from proper_ds.errors import DataError
from proper_ds.evaluation.answers import UNITS, answer_files
from proper_ds.evaluation.label_prior import LabelPrior, fit_prior, save_priors
from proper_ds.evaluation.methods import methods_of
from proper_ds.files import atomic_path, seed_of
from proper_ds.observe.log import get_logger
from proper_ds.training.context import RunContext

ASKED = "asked.npy"
"""Mask over the users whose training questions are answered, in the stage's folder."""
_COLUMNS = ["user", "task", "gold", "scores"]
Labels = dict[str, tuple[str, ...]]
"""By task, of the tasks that have a prior."""


def tasks_with_prior(prepared: PreparedData) -> Labels:
    """Labels by task, of the tasks whose history items carry them: those of LaMP-1 have no candidates."""
    tasks = prepared.manifest.tasks
    return {name: tuple(task.labels) for name, task in tasks.items() if task.labels and task.lamp_id != "LaMP_1"}


def choose_asked(context: RunContext, folder: Path) -> np.ndarray:
    """Mask over the users whose training questions are answered; written down.

    For each task with a prior it is a seeded sample of `prior.max_users` of those who have an answered training
    question and a history item of it. Nobody is asked where no task has one.

    Raises:
        DataError: for a task with a prior of which nobody can be asked.
    """
    config, tokens = context.config, context.tokens
    wanted, found = tasks_with_prior(context.prepared), np.zeros(tokens.num_users, dtype=bool)
    if not wanted:
        get_logger().warning(
            "no history of this data holds labels of a closed set, so methods with a label prior (%s) answer nothing",
            ", ".join(method.name for method in methods_of(config) if method.prior),
        )
        return found
    for code, name in enumerate(context.prepared.manifest.tasks):
        if name not in wanted:
            continue
        legal = np.flatnonzero(_can_be_asked(tokens, code, config.data.train_split))
        if not len(legal):
            raise DataError(
                f"a label prior has nothing to learn from: no user has both a history and an answered question of"
                f" data.train_split {config.data.train_split!r} of task {name}; leave methods that end in +prior out of"
                " evaluation.methods"
            )
        drawn = np.random.default_rng(seed_of(config.seed, "prior users", name)).permutation(legal)
        found[drawn[: config.prior.max_users]] = True
    with atomic_path(folder / ASKED) as temporary, temporary.open("wb") as file:
        np.save(file, found, allow_pickle=False)
    return found


def _can_be_asked(tokens: TokenData, task: int, train_split: str) -> np.ndarray:
    """Mask over the users with an answered training question and a history item of a task."""
    has_question, has_item = np.zeros((2, tokens.num_users), dtype=bool)
    for block in tokens.blocks():
        user, kind = tokens.column("user", *block), tokens.column("kind", *block)
        own = tokens.column("task", *block) == task
        asked = own & (kind == QUERY) & tokens.column("has_answer", *block)
        asked &= tokens.column("split", *block) == tokens.split_code(train_split)
        has_question[user[asked]] = True
        has_item[user[own & (kind == HISTORY)]] = True
    return has_question & has_item


def finish(prepared: PreparedData, folders: Sequence[Path], train_split: str) -> list[dict[str, LabelPrior]]:
    """Fit the priors of some stages from the answers in their folders, and write them; then remove the answers.

    Nothing of one user stays. The histories are read once for all stages.
    """
    labels_of = tasks_with_prior(prepared)
    answers = [_read(folder) for folder in folders] if labels_of else []
    asked = {user for table in answers for user in table.column("user").to_pylist()}
    shares, own = _count(prepared, labels_of, asked, train_split)
    found = [{name: _fit(table, name, labels_of[name], shares[name], own) for name in labels_of} for table in answers]
    found = found or [{} for _ in folders]
    for folder, priors in zip(folders, found, strict=True):
        save_priors(folder, priors)
    for folder in folders if labels_of else ():
        shutil.rmtree(folder / UNITS)
        (folder / ASKED).unlink()
    return found


def _read(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path, columns=_COLUMNS) for path in answer_files(folder)])


def _count(
    prepared: PreparedData, labels_of: Labels, asked: set[int], train_split: str
) -> tuple[dict[str, np.ndarray], dict[tuple[str, int], np.ndarray]]:
    """Everybody's share of each label [L] by task, and the asked users' counts of their own [L] by task and user."""
    place = {name: {label: n for n, label in enumerate(labels)} for name, labels in labels_of.items()}
    totals = {name: np.ones(len(labels)) for name, labels in labels_of.items()}
    own: dict[tuple[str, int], np.ndarray] = {}
    for index, user in enumerate(prepared.users() if labels_of else ()):
        if not user.teaches(train_split):
            continue
        counts = Counter((item.task, item.answer) for item in user.history if item.task in place)
        for name, total in totals.items():
            counts_L = np.zeros_like(total)
            for (task, label), num in counts.items():
                if task == name:
                    counts_L[place[name][label]] = num
            total += counts_L
            if index in asked:
                own[name, index] = counts_L
    return {name: total / total.sum() for name, total in totals.items()}, own


def _fit(
    answers: pa.Table,
    task: str,
    labels: tuple[str, ...],
    share_L: np.ndarray,
    own: dict[tuple[str, int], np.ndarray],
) -> LabelPrior:
    rows = [row for row in answers.to_pylist() if row["task"] == task]
    scores_QL = np.asarray([row["scores"] for row in rows], dtype=np.float64)
    counts_QL = np.stack([own[task, row["user"]] for row in rows])
    gold_Q = np.asarray([labels.index(row["gold"]) for row in rows])
    return fit_prior(labels, share_L, scores_QL, counts_QL, gold_Q)
