"""Stage `prior/<level>`: whose questions a label prior is learned from, and the fit once the actors have answered them.

`pipeline/steps.py` calls both; the answers are made by `predict_job.py` as all answers are.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from proper_ds.data.prepared import PreparedData
from proper_ds.errors import DataError
from proper_ds.evaluation.answers import read_answers
from proper_ds.evaluation.label_prior import LabelPrior, counts_of, fit_prior, save_priors
from proper_ds.evaluation.methods import methods_of
from proper_ds.files import atomic_path, seed_of
from proper_ds.observe.log import get_logger
from proper_ds.training.context import RunContext
from proper_ds.training.selection import first_questions, num_history

ASKED = "asked.npy"
"""Mask over the users whose training questions are answered, in the stage's folder."""


def choose_asked(context: RunContext, folder: Path) -> np.ndarray:
    """Mask over a seeded sample of the training users with history and an answered question; written down.

    Nobody is asked where no task has a prior.

    Raises:
        DataError: where some task has one, and nobody can be asked.
    """
    config = context.config
    if not tasks_with_prior(context.prepared):
        get_logger().warning(
            "no history of this data holds labels of a closed set, so methods with a label prior (%s) answer nothing",
            ", ".join(method.name for method in methods_of(config) if method.prior),
        )
        return np.zeros(context.tokens.num_users, dtype=bool)
    mask = (first_questions(context.tokens, config.data.train_split) >= 0) & (num_history(context.tokens) > 0)
    if not mask.any():
        raise DataError(
            f"a label prior has nothing to learn from: no user has both a history and an answered question of"
            f" data.train_split {config.data.train_split!r}; leave methods with a prior out of evaluation.methods"
        )
    if config.prior.max_users is not None and mask.sum() > config.prior.max_users:
        order = np.random.default_rng(seed_of(config.seed, "prior users")).permutation(np.flatnonzero(mask))
        mask = np.zeros_like(mask)
        mask[order[: config.prior.max_users]] = True
    with atomic_path(folder / ASKED) as temporary, temporary.open("wb") as file:
        np.save(file, mask, allow_pickle=False)
    return mask


def finish(context: RunContext, folder: Path) -> dict[str, LabelPrior]:
    """Fit a prior for each task with labels, write them, and remove the answers: nothing of one user stays."""
    priors = {}
    if tasks_with_prior(context.prepared):
        priors = fit_priors(context.prepared, folder, context.config.data.train_split)
        shutil.rmtree(folder / "units")
        (folder / ASKED).unlink()
    save_priors(folder, priors)
    return priors


def tasks_with_prior(prepared: PreparedData) -> dict[str, tuple[str, ...]]:
    """Labels by task, of the tasks whose history items carry them: those of LaMP-1 have no candidates."""
    tasks = prepared.manifest.tasks
    return {name: tuple(task.labels) for name, task in tasks.items() if task.labels and task.lamp_id != "LaMP_1"}


def fit_priors(prepared: PreparedData, folder: Path, train_split: str) -> dict[str, LabelPrior]:
    """By task, from the answers in `folder`. Tasks whose sampled users have no question get none."""
    answers = read_answers(folder)
    asked = {int(user) for user in answers.column("user").to_pylist()}
    own: dict[tuple[str, int], list[str]] = {}
    labels_of = tasks_with_prior(prepared)
    totals = {name: np.ones(len(labels)) for name, labels in labels_of.items()}
    for index, user in enumerate(prepared.users()):
        if not user.teaches(train_split):
            continue
        for name, total in totals.items():
            given = [item.answer for item in user.history if item.task == name]
            total += counts_of(given, labels_of[name])
            if index in asked:
                own[name, index] = given
    found = {}
    for name, total in totals.items():
        labels = labels_of[name]
        rows = [row for row in answers.to_pylist() if row["task"] == name and row["gold"] is not None]
        if not rows:
            continue
        scores_QL = np.asarray([row["scores"] for row in rows], dtype=np.float64)
        counts_QL = np.asarray([counts_of(own[name, row["user"]], labels) for row in rows], dtype=np.float64)
        gold_Q = np.asarray([labels.index(row["gold"]) for row in rows])
        found[name] = fit_prior(labels, total / total.sum(), scores_QL, counts_QL, gold_Q)
    return found
