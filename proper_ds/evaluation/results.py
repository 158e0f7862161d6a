"""From predictions to scores: by method, task, metric and history length, with paired bootstrap differences.

Reads what `predict_job.py` committed; `report.py` turns the result into files for people.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from proper_ds.data.manifest import TaskManifest
from proper_ds.evaluation.answers import read_answers
from proper_ds.evaluation.bootstrap import Scored, percentiles, score
from proper_ds.evaluation.config import EvaluationConfig
from proper_ds.evaluation.metrics import Metric, metrics_of
from proper_ds.files import seed_of, write_json_atomic

NUM_BUCKETS = 4


@dataclass(frozen=True)
class Answers:
    """All answers to one task's questions with known golds, in columns.

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


def read_predictions(folder: Path, methods: Sequence[str]) -> pa.Table:
    """All answers of the methods below `predictions/` as one table, in a fixed order."""
    return pa.concat_tables([read_answers(folder / method) for method in methods])


def answers_of(table: pa.Table, task: str, methods: list[str]) -> Answers:
    """The scored answers of one task."""
    rows = [row for row in table.to_pylist() if row["task"] == task and row["gold"] is not None]
    by_method = {m: {r["id"]: r for r in rows if r["method"] == m} for m in methods}
    first = by_method[methods[0]]
    ids = list(first)
    for method, found in by_method.items():
        assert found.keys() == first.keys(), f"{method} did not answer the same questions"
    return Answers(
        ids,
        np.asarray([first[i]["user"] for i in ids], dtype=np.int64),
        np.asarray([first[i]["num_history"] for i in ids], dtype=np.int64),
        [first[i]["gold"] for i in ids],
        {m: [by_method[m][i]["prediction"] for i in ids] for m in methods},
    )


def _sums(metric: Metric, golds: list[str], given: list[str], users: np.ndarray) -> np.ndarray:
    """Each user's summed statistics [U, K]."""
    stats = np.stack([metric.statistics(gold, text) for gold, text in zip(golds, given, strict=True)])
    _, inverse = np.unique(users, return_inverse=True)
    sums = np.zeros((inverse.max() + 1, stats.shape[1]))
    np.add.at(sums, inverse, stats)
    return sums


def _scores(answers: Answers, metric: Metric, chosen: np.ndarray, config: EvaluationConfig) -> dict[str, Scored]:
    positions = np.flatnonzero(chosen)
    golds, users = [answers.golds[i] for i in positions], answers.users[positions]
    seed = seed_of("bootstrap", metric.name)
    return {
        method: score(
            metric, _sums(metric, golds, [given[i] for i in positions], users), config.num_bootstrap_samples, seed
        )
        for method, given in answers.predictions.items()
    }


def _entry(scored: Scored, confidence: float) -> dict[str, Any]:
    return {
        "value": scored.value,
        "user_mean": scored.user_mean,
        "interval": list(scored.interval(confidence)),
    }


def _comparisons(scores: dict[str, Scored], metric: Metric, confidence: float) -> list[dict[str, Any]]:
    """Each pair of methods, later minus earlier, positive where the later one is better."""
    found, names = [], list(scores)
    sign = 1 if metric.higher_is_better else -1
    for i, rival in enumerate(names):
        for method in names[i + 1 :]:
            gain = sign * (scores[method].value - scores[rival].value)
            low, high = percentiles(sign * (scores[method].samples - scores[rival].samples), confidence)
            verdict = "better" if low > 0 else "worse" if high < 0 else "no difference beyond the interval"
            found.append({"method": method, "than": rival, "gain": gain, "interval": [low, high], "verdict": verdict})
    return found


def history_buckets(history: np.ndarray, users: np.ndarray) -> list[tuple[str, int, int]]:
    """(label, from, to) of history lengths: cold users, then about equally many users in each."""
    _, first = np.unique(users, return_index=True)
    lengths = np.sort(history[first])
    buckets = [("0", 0, 0)] if lengths[0] == 0 else []
    warm = lengths[lengths > 0]
    if not len(warm):
        return buckets
    edges = sorted({int(edge) for edge in np.quantile(warm, np.linspace(0, 1, NUM_BUCKETS + 1)[1:], method="lower")})
    low = int(warm[0])
    for edge in edges:
        if edge >= low:
            buckets.append((f"{low}-{edge}" if edge > low else str(low), low, edge))
            low = edge + 1
    return buckets


def evaluate_task(task: TaskManifest, answers: Answers, config: EvaluationConfig) -> dict[str, Any]:
    """Everything the report says about one task: `methods`, `comparisons` and `by_history`, by metric."""
    everyone = np.ones(len(answers.golds), dtype=bool)
    result: dict[str, Any] = {
        "num_questions": len(answers.golds),
        "num_users": len(np.unique(answers.users)),
        "methods": {method: {} for method in answers.predictions},
        "comparisons": {},
        "by_history": [],
    }
    metrics = metrics_of(task)
    for metric in metrics:
        scores = _scores(answers, metric, everyone, config)
        for method, scored in scores.items():
            result["methods"][method][metric.name] = _entry(scored, config.confidence)
        result["comparisons"][metric.name] = _comparisons(scores, metric, config.confidence)
    for label, low, high in history_buckets(answers.history, answers.users):
        chosen = (answers.history >= low) & (answers.history <= high)
        bucket: dict[str, Any] = {
            "history": label,
            "num_users": len(np.unique(answers.users[chosen])),
            "num_questions": int(chosen.sum()),
            "methods": {method: {} for method in answers.predictions},
            "comparisons": {},
        }
        for metric in metrics:
            scores = _scores(answers, metric, chosen, config)
            for method, scored in scores.items():
                bucket["methods"][method][metric.name] = _entry(scored, config.confidence)
            bucket["comparisons"][metric.name] = _comparisons(scores, metric, config.confidence)
        result["by_history"].append(bucket)
    return result


def write_lamp_files(table: pa.Table, tasks: dict[str, TaskManifest], folder: Path) -> None:
    """A method's answers in LaMP's own format, `lamp/<task>.json` in the method's folder: `task`, `golds`, `model`."""
    rows = table.to_pylist()
    for name, task in tasks.items():
        golds = [{"id": row["id"], "output": row["prediction"]} for row in rows if row["task"] == name]
        about = {"task": task.lamp_id, "golds": golds, "model": folder.name}
        write_json_atomic(folder / "lamp" / f"{name}.json", about)


def mean_gates(table: pa.Table, methods: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By method with groups: (users [U], each one's gates [U, modules, experts], the mean over the questions)."""
    found = {}
    for method in methods:
        rows = [row for row in table.to_pylist() if row["method"] == method and row["gates"]]
        if not rows:
            continue
        gates = np.asarray([row["gates"] for row in rows], dtype=np.float64)
        gates = gates.reshape(len(rows), -1, rows[0]["num_experts"])
        users, inverse = np.unique([row["user"] for row in rows], return_inverse=True)
        means = np.zeros((len(users), *gates.shape[1:]))
        np.add.at(means, inverse, gates)
        found[method] = (users, means / np.bincount(inverse)[:, None, None])
    return found


def expert_use(table: pa.Table, methods: list[str]) -> dict[str, Any]:
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
