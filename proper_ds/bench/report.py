"""Scoring many methods: seconds to all of a task's numbers, beside a bootstrap of one method after another.

`proper-ds bench report` calls it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from proper_ds.bench.harness import in_turn, machine, tell, write_result
from proper_ds.data.manifest import TaskManifest
from proper_ds.data.tasks import TASKS
from proper_ds.evaluation.bootstrap import score
from proper_ds.evaluation.metrics import metrics_of
from proper_ds.evaluation.questions import Answers
from proper_ds.evaluation.results import Scoring, evaluate_task, statistics, user_sums
from proper_ds.files import seed_of

NUM_SAMPLES, CONFIDENCE = 1000, 0.95
QUESTIONS_PER_USER = 4
KINDS = {"ratings": "LaMP_3", "labels": "LaMP_2M", "texts": "LaMP_5"}
_NUM_WORDS, _VOCABULARY = 12, 2000


def made_up(task: TaskManifest, num_methods: int, num_questions: int, seed: int) -> Answers:
    """Answers of which half are right; texts share a third of their words with the gold."""
    draw = np.random.default_rng(seed)
    users = np.arange(num_questions) // QUESTIONS_PER_USER
    golds = [_answer(task, draw) for _ in range(num_questions)]
    given = {f"method-{n}": [_attempt(task, gold, draw) for gold in golds] for n in range(num_methods)}
    history = draw.integers(0, 60, users.max() + 1)[users]
    return Answers([str(n) for n in range(num_questions)], users, history, golds, given)


def _answer(task: TaskManifest, draw: np.random.Generator) -> str:
    if task.labels is not None:
        return str(draw.choice(task.labels))
    return " ".join(f"word{n}" for n in draw.integers(0, _VOCABULARY, _NUM_WORDS))


def _attempt(task: TaskManifest, gold: str, draw: np.random.Generator) -> str:
    if task.labels is not None:
        return gold if draw.random() < 0.5 else _answer(task, draw)
    other = _answer(task, draw).split()
    return " ".join(own if draw.random() < 1 / 3 else word for own, word in zip(gold.split(), other, strict=True))


def _one_by_one(task: TaskManifest, answers: Answers) -> None:
    """Values and samples of each method on its own, for all questions only."""
    for metric in metrics_of(task):
        for name, given in answers.predictions.items():
            sums = {name: user_sums(statistics(metric, answers.golds, given), answers.users)}
            score(metric, sums, NUM_SAMPLES, seed_of("bootstrap", metric.name))


def bench_report(num_methods: int, num_questions: int, num_repeats: int, json_file: Path | None) -> None:
    """Measure each kind of task, print a table and write it."""
    scoring = Scoring(NUM_SAMPLES, CONFIDENCE, ("method-0", "method-1", "method-2"))
    rows, found = [], dict[str, Any]()
    for kind, name in KINDS.items():
        task = TaskManifest.of(TASKS[name], "", generated=True)
        # answers of their own, so that neither finds the other's texts scored already
        answers = [made_up(task, num_methods, num_questions, seed) for seed in (0, 1)]
        sizes: list[int] = []

        def whole(task: TaskManifest = task, own: Answers = answers[0], sizes: list[int] = sizes) -> None:
            sizes.append(len(json.dumps(evaluate_task(task, own, scoring))))

        def alone(task: TaskManifest = task, own: Answers = answers[1]) -> None:
            _one_by_one(task, own)

        seconds = in_turn({"report": whole, "values": alone}, num_repeats)
        rows.append([kind, *(f"{seconds[n].median:.1f} (± {seconds[n].spread:.0%})" for n in seconds), f"{sizes[0]:,}"])
        found[kind] = {name: one.values for name, one in seconds.items()} | {"json_bytes": sizes[0]}
    about = {"num_methods": num_methods, "num_questions": num_questions, "num_samples": NUM_SAMPLES}
    result = {"machine": machine(), **about, "seconds": found}
    tell(
        f"Scores of {num_methods} methods on {num_questions:,} questions, {NUM_SAMPLES} bootstrap samples",
        ["task", "whole report s", "values alone, method by method s", "JSON bytes"],
        rows,
        ["whole report: all pairs, history buckets, halves, cold users, floors; a text's ROUGE is computed once"],
        result,
    )
    write_result(json_file, result)
