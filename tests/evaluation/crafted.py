"""Predictions made by hand, for tests of results, reports and tables."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from proper_ds.data.manifest import TaskManifest
from proper_ds.data.tasks import TASKS
from proper_ds.evaluation.answers import SCHEMA

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
