"""Predictions made by hand, for tests of results, reports and tables."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import yaml

from proper_ds.data.manifest import TaskManifest
from proper_ds.data.tasks import TASKS
from proper_ds.evaluation.answers import SCHEMA, write_answers
from proper_ds.evaluation.configuration import configuration_digest
from proper_ds.evaluation.costs import Work, costs_of
from proper_ds.evaluation.questions import read_predictions
from proper_ds.evaluation.results import Scoring, score_tasks
from proper_ds.evaluation.verify import by_method, write_sums

RATINGS = TaskManifest.of(TASKS["LaMP_3"], "", generated=True)
TAGS = TaskManifest.of(TASKS["LaMP_2N"], "", generated=False)


def row(method, user, number, gold, prediction, num_history, task="LaMP_3", **more):
    """One line of a predictions file."""
    return {
        "method": method,
        "user": user,
        "task": task,
        "id": f"{user}-{number}",
        "gold": gold,
        "prediction": prediction,
        "num_history": num_history,
        "personal": False,
        "scores": [],
        "gates": [],
        "num_experts": 0,
    } | more


def table(rows):
    """Lines as a predictions file has them."""
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def ratings(methods, num_users=30, num_questions=3, seed=0):
    """Lines of LaMP_3 answers: `methods` maps a name to its chance of being right; user u has u history items."""
    generator, rows = np.random.default_rng(seed), []
    for user in range(num_users):
        for n in range(num_questions):
            gold = str(1 + (user + n) % 5)
            wrong = str(1 + (user + n + 1) % 5)
            draw = generator.random()  # one for all methods: a better one is right wherever a worse one is
            rows += [
                row(name, user, n, gold, gold if draw < chance else wrong, user) for name, chance in methods.items()
            ]
    return rows


CONFIGURATION = {
    "output_dir": "runs/x",
    "seed": 41,
    "population": {"learning_rate": 1e-5, "train_batch_size": None, "save_steps": 100},
    "evaluation": {"methods": ["base"], "num_tokens_per_batch": 4096},
    "chosen_by": [],
}
PROTOCOL = {
    "name": "user-based",
    "share_of_users_also_in_training": 0.0,
    "split": "dev",
    "train_split": "train",
    "seed": 41,
    "base": "some/base",
    "base_parameters": 1000,
    "base_dtype": "float32",
    "decoding": "greedy",
    "confidence": 0.95,
    "num_bootstrap_samples": 100,
    "cautions": ["of another base"],
}


def write_run(root, rows, references=("OPPU",), task=RATINGS):
    """A run's predictions, in two units for each method, and a report of them; returns the report."""
    names = list(dict.fromkeys(r["method"] for r in rows))
    half = max(r["user"] for r in rows) // 2
    for method in names:
        own = [r for r in rows if r["method"] == method]
        folder = root / "predictions" / method
        write_answers(folder, "unit-0", table([r for r in own if r["user"] <= half]))
        write_answers(folder, "unit-1", table([r for r in own if r["user"] > half]))
    scoring = Scoring(PROTOCOL["num_bootstrap_samples"], PROTOCOL["confidence"], tuple(references))
    manifests = {rows[0]["task"]: task}
    scored = by_method(score_tasks(read_predictions(root, names), manifests, names, scoring), names)
    for about in scored["tasks"].values():
        about["published"] = []
    behind = {name: ["population", f"store/{name}"] for name in names}
    works = {"population": Work(10.0, 1000)} | {f"store/{name}": Work(5.0, 500) for name in names}
    report = scored | {
        "run": "runs/x",
        "config_digest": configuration_digest(CONFIGURATION),
        "protocol": PROTOCOL | {"references": list(references)},
        "predictions": write_sums(root, names),
        "prompts": {},
        "taught_by_asked": [],
        "method_notes": dict.fromkeys(names, "a <b>method</b>"),
        "costs": costs_of(behind, works, {name: 100.0 * n for n, name in enumerate(names)}, []),
        "users": {"num_users": 40, "num_cold_users": 1, "sets": {}},
        "stages": {"population": 1.0},
        "versions": {"torch": "1"},
        "kept": {},
        "gates": {},
        "experts": {},
        "router_jumps": [],
        "grouping": {},
        "test_reads": 0,
        "chosen_by": [],
    }
    (root / "config.yaml").write_text(yaml.safe_dump(CONFIGURATION))
    (root / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return report
