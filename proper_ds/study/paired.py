"""Paired differences of a method between runs that answered the same questions; the study's ablation tables use it.

Runs are paired by the ids of their questions, whatever order or number of users they have; users are drawn as in a
run's own report. Shapes: Q questions, U users, K statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from proper_ds.evaluation.bootstrap import Scores, score
from proper_ds.evaluation.compare import gain
from proper_ds.evaluation.metrics import Metric, metrics_of
from proper_ds.evaluation.questions import SCORED, Answers, answers_of, read_predictions
from proper_ds.evaluation.results import statistics, user_sums
from proper_ds.evaluation.verify import manifest_of
from proper_ds.files import seed_of
from proper_ds.study.finished import FinishedRun

_BEFORE, _AFTER = "before", "after"


def paired_difference(
    before: Sequence[FinishedRun], after: Sequence[FinishedRun], task: str, method: str
) -> dict[str, Any] | None:
    """What a method gained from runs `before` to runs `after`, in the task's first metric.

    Runs of one seed are paired; with several seeds a user's statistics are added up over them, and users are drawn.

    Returns:
        As in a report's comparisons, with `num_questions`, `num_users` and `seeds`; None where no question is common.
    """
    about = after[0].report["tasks"][task]
    metric = metrics_of(manifest_of(task, about))[0]
    first = {run.seed: run for run in before}
    parts = [_common(first[run.seed], run, task, method) for run in after if run.seed in first]
    parts = [part for part in parts if len(part[0].ids)]
    if not parts:
        return None
    keys = sorted({key for old, _ in parts for key in old.users.tolist()})
    sums = {
        name: np.sum([_sums(metric, pair[n], method, keys) for pair in parts], axis=0)
        for n, name in enumerate((_BEFORE, _AFTER))
    }
    protocol = after[0].report["protocol"]
    scores: Scores = score(metric, sums, protocol["num_bootstrap_samples"], seed_of("bootstrap", metric.name))
    found = gain(scores, _AFTER, _BEFORE, protocol["confidence"])
    return {key: value for key, value in found.items() if key not in ("method", "than")} | {
        "metric": metric.name,
        "value": float(scores.value_M[1]),
        "num_questions": sum(len(old.ids) for old, _ in parts),
        "num_users": len(keys),
        "seeds": [run.seed for run in after if run.seed in first],
    }


def _common(before: FinishedRun, after: FinishedRun, task: str, method: str) -> tuple[Answers, Answers]:
    """Both runs' answers to the questions that both were asked, in the same order; users are numbered as in the first.

    A question is known by its id and its place among those of the same id, which users may share.
    """
    both = [answers_of(read_predictions(run.folder, [method], SCORED), task, [method]) for run in (before, after)]
    places = [{key: n for n, key in enumerate(_keys(answers.ids))} for answers in both]
    common = [key for key in places[0] if key in places[1]]
    rows = [[place[key] for key in common] for place in places]
    old, new = (_chosen(answers, chosen, method) for answers, chosen in zip(both, rows, strict=True))
    assert old.golds == new.golds, f"{before.name} and {after.name} have other golds for the same questions of {task}"
    return old, Answers(new.ids, old.users, new.history, new.golds, new.predictions)


def _keys(ids: Sequence[str]) -> list[tuple[str, int]]:
    seen: dict[str, int] = {}
    found = []
    for name in ids:
        found.append((name, seen.get(name, 0)))
        seen[name] = seen.get(name, 0) + 1
    return found


def _chosen(answers: Answers, rows: Sequence[int], method: str) -> Answers:
    given = answers.predictions[method] if rows else []
    return Answers(
        [answers.ids[n] for n in rows],
        answers.users[list(rows)],
        answers.history[list(rows)],
        [answers.golds[n] for n in rows],
        {method: [given[n] for n in rows]},
    )


def _sums(metric: Metric, answers: Answers, method: str, keys: Sequence[int]) -> np.ndarray:
    """Each user's summed statistics [U, K] in the order of `keys`; zeros for users who were not asked."""
    sums = user_sums(statistics(metric, answers.golds, answers.predictions[method]), answers.users)
    found = np.zeros((len(keys), sums.shape[1]))
    found[np.searchsorted(keys, np.unique(answers.users))] = sums
    return found
