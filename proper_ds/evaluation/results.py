"""From predictions to scores: by method, task, metric and history length, with paired bootstrap differences.

Reads what `questions.py` puts in order; `report.py` turns the result into files for people. The numbers of a task
depend on its answers and on `Scoring` alone, so that `verify.py` can compute them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from proper_ds.data.manifest import TaskManifest
from proper_ds.evaluation.bootstrap import Scores, score
from proper_ds.evaluation.compare import against_floor, comparisons, matrix
from proper_ds.evaluation.config import EvaluationConfig
from proper_ds.evaluation.history import history_buckets, history_parts
from proper_ds.evaluation.metrics import Metric, metrics_of
from proper_ds.evaluation.questions import Answers, answers_of
from proper_ds.files import seed_of, write_json_atomic


@dataclass(frozen=True)
class Scoring:
    """What the scores depend on besides the answers.

    Attributes:
        references: the methods that the others are compared with by name.
    """

    num_bootstrap_samples: int
    confidence: float
    references: tuple[str, ...]

    @classmethod
    def of(cls, config: EvaluationConfig) -> Scoring:
        """As a run is configured."""
        return cls(config.num_bootstrap_samples, config.confidence, tuple(config.compared_with))


def statistics(metric: Metric, golds: Sequence[str], given: Sequence[str]) -> np.ndarray:
    """Each question's statistics [Q, K]; equal pairs of gold and answer are looked at once."""
    known: dict[tuple[str, str], np.ndarray] = {}
    found = []
    for pair in zip(golds, given, strict=True):
        if pair not in known:
            known[pair] = metric.statistics(*pair)
        found.append(known[pair])
    return np.stack(found)


def user_sums(stats_QK: np.ndarray, users_Q: np.ndarray) -> np.ndarray:
    """Each user's summed statistics [U, K], by ascending index."""
    _, inverse = np.unique(users_Q, return_inverse=True)
    sums = np.zeros((inverse.max() + 1, stats_QK.shape[1]))
    np.add.at(sums, inverse, stats_QK)
    return sums


def _entries(scores: Scores, confidence: float) -> dict[str, dict[str, Any]]:
    return {
        method: {
            "value": float(scores.value_M[n]),
            "interval": scores.interval(scores.value_MB[n], confidence),
            "user_mean": float(scores.user_mean_M[n]),
            "user_mean_interval": scores.interval(scores.user_mean_MB[n], confidence),
        }
        for n, method in enumerate(scores.methods)
    }


Scorer = Callable[[np.ndarray | None], list[Scores]]
"""Scores of every metric for the users where the mask [U] is true, or for all (None)."""


def _scorer(answers: Answers, metrics: Sequence[Metric], scoring: Scoring) -> Scorer:
    """Keeps sums over users, not the statistics of questions, of which there may be many more."""
    sums = {
        metric.name: {
            method: user_sums(statistics(metric, answers.golds, given), answers.users)
            for method, given in answers.predictions.items()
        }
        for metric in metrics
    }

    def scores_of(metric: Metric, chosen_U: np.ndarray | None) -> Scores:
        seed = seed_of("bootstrap", metric.name)
        return score(metric, sums[metric.name], scoring.num_bootstrap_samples, seed, chosen_U)

    return lambda chosen_U: [scores_of(metric, chosen_U) for metric in metrics]


def _part(found: Sequence[Scores], scoring: Scoring) -> dict[str, Any]:
    """`methods` and `comparisons` by metric."""
    part: dict[str, Any] = {"methods": {}, "comparisons": {}}
    for scores in found:
        name = scores.metric.name
        for method, entry in _entries(scores, scoring.confidence).items():
            part["methods"].setdefault(method, {})[name] = entry
        part["comparisons"][name] = comparisons(scores, scoring.references, scoring.confidence)
    return part


def evaluate_task(task: TaskManifest, answers: Answers, scoring: Scoring) -> dict[str, Any]:
    """Everything the report says about one task.

    Keys of the result: `num_questions`, `num_users`; `methods` [method][metric] with `value` over questions,
    `user_mean` and an interval of each; `comparisons` [metric], every method against the references; `matrix`
    [metric], all pairs of methods; `floor` (see `against_floor`), for the first metric; and `by_history` and `parts`,
    lists with the same `methods` and `comparisons` for users by history length: buckets, and cold users and halves
    (`part` says which).
    """
    scores_of = _scorer(answers, metrics_of(task), scoring)
    users, first, num_questions_U = np.unique(answers.users, return_index=True, return_counts=True)
    history_U = answers.history[first]
    whole = scores_of(None)
    result: dict[str, Any] = {"num_questions": len(answers.golds), "num_users": len(users)}
    result |= _part(whole, scoring)
    result["matrix"] = {scores.metric.name: matrix(scores, scoring.confidence) for scores in whole}
    result["floor"] = against_floor(whole[0], scoring.confidence)

    def slice_of(label: str, low: int, high: int) -> dict[str, Any]:
        chosen_U = (history_U >= low) & (history_U <= high)
        num_questions = int(num_questions_U[chosen_U].sum())
        about = {"history": label, "num_users": int(chosen_U.sum()), "num_questions": num_questions}
        return about | _part(scores_of(chosen_U), scoring)

    result["by_history"] = [slice_of(*bucket) for bucket in history_buckets(history_U, users)]
    result["parts"] = [{"part": name} | slice_of(*bucket) for name, bucket in history_parts(history_U, users)]
    return result


def score_tasks(
    table: pa.Table, tasks: dict[str, TaskManifest], methods: Sequence[str], scoring: Scoring
) -> dict[str, dict[str, Any]]:
    """`evaluate_task` for each task with known golds, and what is needed to score it again."""
    found = {}
    for name, task in tasks.items():
        answers = answers_of(table, name, methods)
        if answers.ids:
            about = {
                "lamp_id": task.lamp_id,
                "kind": task.kind,
                "generated": task.generated,
                "labels": list(task.labels) if task.labels is not None else None,
                "metrics": {metric.name: metric.higher_is_better for metric in metrics_of(task)},
            }
            found[name] = about | evaluate_task(task, answers, scoring)
    return found


def write_lamp_files(table: pa.Table, tasks: dict[str, TaskManifest], folder: Path) -> None:
    """A method's answers in LaMP's own format, in the method's folder: `lamp/<task>.json` with `task` and `golds`."""
    rows = table.select(["task", "id", "prediction"]).to_pylist()
    for name, task in tasks.items():
        golds = [{"id": row["id"], "output": row["prediction"]} for row in rows if row["task"] == name]
        about = {"task": task.lamp_id, "golds": golds, "model": folder.name}
        write_json_atomic(folder / "lamp" / f"{name}.json", about)


def mean_gates(table: pa.Table, methods: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By method with groups: (users [U], each one's gates [U, modules, experts], the mean over the questions)."""
    found = {}
    table = table.select(["method", "user", "gates", "num_experts"])
    for method in methods:
        rows = table.filter((pc.field("method") == method) & (pc.list_value_length(pc.field("gates")) > 0))
        if not len(rows):
            continue
        flat = pc.list_flatten(rows.column("gates")).to_numpy().astype(np.float64)
        gates = flat.reshape(len(rows), -1, rows.column("num_experts")[0].as_py())
        users, inverse = np.unique(rows.column("user").to_numpy(), return_inverse=True)
        means = np.zeros((len(users), *gates.shape[1:]))
        np.add.at(means, inverse, gates)
        found[method] = (users, means / np.bincount(inverse)[:, None, None])
    return found


def expert_use(table: pa.Table, methods: Sequence[str]) -> dict[str, Any]:
    """How users spread over experts, by method with groups.

    `dominant_share` [modules][experts]: the share of users whose strongest expert in that module it is.
    """
    found: dict[str, Any] = {}
    for method, (_, means) in mean_gates(table, methods).items():
        num_experts = means.shape[-1]
        strongest = means.argmax(-1)
        share = np.stack([(strongest == expert).mean(0) for expert in range(num_experts)], axis=-1)
        found[method] = {
            "num_experts": num_experts,
            "dominant_share": share.tolist(),
            "mean_gate": means.mean((0, 1)).tolist(),
            "mean_largest_gate": float(means.max(-1).mean()),
        }
    return found
