"""From a sweep file to its trials, and from a trial's report to the number that is compared. Pure but for reading.

`sweep.py` runs the trials.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proper_ds.config import RunConfig, apply_chosen, validate
from proper_ds.errors import ConfigError, Problem, UserError
from proper_ds.evaluation.configuration import configuration_hash
from proper_ds.files import digest_of, seed_of
from proper_ds.study.config import Objective, Range, SweepConfig
from proper_ds.study.effects import idle_parameters, same_answers
from proper_ds.study.merge import dotted_keys, merged, without_model

TRIALS = "trials"
MAX_DRAWS = 1000
"""Draws for one more different trial before the sweep says that there are no more."""


@dataclass(frozen=True)
class Trial:
    """One point of a sweep.

    Attributes:
        name: its folder below the sweep's `trials/`, after its values: another sweep file finds what it shares.
        overrides: values by dotted key.
    """

    name: str
    overrides: dict[str, Any]
    config: RunConfig

    @property
    def config_hash(self) -> str:
        """Of everything that can change an answer, but the seed."""
        return configuration_hash(self.config.model_dump(mode="json"))


@dataclass(frozen=True)
class Score:
    """What a trial is compared by."""

    method: str
    task: str
    metric: str
    value: float
    higher_is_better: bool

    @property
    def rank(self) -> float:
        """Larger is better; a value that is no number is worst."""
        signed = self.value if self.higher_is_better else -self.value
        return signed if math.isfinite(signed) else -math.inf


def plan_trials(sweep: SweepConfig, source: str) -> list[Trial]:
    """Every trial with a checked configuration; the same list every time.

    Raises:
        ConfigError: with every problem of every trial; one that many share is told once. Parameters without effect
            on the objective's methods are refused.
    """
    trials: list[Trial] = []
    problems: dict[str, Problem] = {}
    for overrides in points(sweep):
        name = digest_of(overrides)[:10]
        try:
            trials.append(Trial(name, overrides, _config(sweep, name, overrides, source)))
        except ConfigError as error:
            for problem in error.problems:
                shown = Problem(f"{_values(overrides)}: {problem.key}", problem.wrong, problem.mend)
                problems.setdefault(str(problem), shown)
    if not problems:
        found = idle_parameters([trial.overrides for trial in trials], lambda o: _config(sweep, "compared", o, source))
        problems = {str(problem): problem for problem in found or _same_trials(trials)}
    if problems:
        raise ConfigError(source, list(problems.values()))
    return trials


def _config(sweep: SweepConfig, name: str, overrides: dict[str, Any], source: str) -> RunConfig:
    given = merged(sweep.run)
    if sweep.base is not None:
        given = without_model(given) | {"base.model": sweep.base}
    own = {
        "output_dir": str(Path(sweep.output_dir) / TRIALS / name),
        "seed": sweep.seed,
        "evaluation.split": sweep.objective.split,
        "evaluation.methods": sweep.objective.method,
    }
    raw = merged(given, overrides, own)
    return validate(raw, source, apply_chosen(raw, dotted_keys(overrides)))


def _same_trials(trials: Sequence[Trial]) -> list[Problem]:
    same = same_answers({f"{_values(trial.overrides)} ({n + 1})": trial.config for n, trial in enumerate(trials)})
    wrong = "would give the same answers: what differs has no effect there"
    return [Problem("parameters", f"{' and '.join(names)} {wrong}", "Keep one of them.") for names in same]


def points(sweep: SweepConfig) -> list[dict[str, Any]]:
    """The values to try: all combinations, or `num_trials` different ones, drawn by the seed.

    Raises:
        ConfigError: where there are fewer different ones.
    """
    if sweep.search == "grid":
        lists = [values for values in sweep.parameters.values() if isinstance(values, list)]
        return [dict(zip(sweep.parameters, chosen, strict=True)) for chosen in itertools.product(*lists)]
    assert sweep.num_trials is not None, "checked with the file"
    found: dict[str, dict[str, Any]] = {}
    for point in itertools.islice(_draws(sweep), MAX_DRAWS * sweep.num_trials):
        found.setdefault(digest_of(point), point)
        if len(found) == sweep.num_trials:
            return list(found.values())
    mend = f"There are {len(found)} different ones: lower it, or search `grid`."
    raise ConfigError("sweep", [Problem("num_trials", f"{sweep.num_trials} are more than there are", mend)])


def _draws(sweep: SweepConfig) -> Iterator[dict[str, Any]]:
    for number in itertools.count():
        yield {
            key: _draw(values, random.Random(seed_of("sweep", sweep.search_seed, number, key)))
            for key, values in sweep.parameters.items()
        }


def _draw(values: list[Any] | Range, generator: random.Random) -> Any:
    if isinstance(values, list):
        return generator.choice(values)
    low, high = (math.log(values.low), math.log(values.high)) if values.log else (values.low, values.high)
    drawn = generator.uniform(low, high)
    drawn = math.exp(drawn) if values.log else drawn
    drawn = min(max(drawn, values.low), values.high)
    return round(drawn) if values.integer else float(f"{drawn:.4g}")


def _values(overrides: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in overrides.items())


def choose_metric(tasks: Mapping[str, Sequence[str]], objective: Objective) -> tuple[str, str]:
    """(task, metric) that trials are compared by.

    Args:
        tasks: the metrics of each task, the main one first.

    Raises:
        UserError: where there is no such task or metric, or there are several tasks and none is named.
    """
    task = objective.task or (next(iter(tasks)) if len(tasks) == 1 else None)
    if task is None or task not in tasks:
        raise UserError(f"objective.task: given {objective.task!r}; the data has {', '.join(tasks)}: name one")
    metric = tasks[task][0] if objective.metric == "auto" else objective.metric
    if metric not in tasks[task]:
        raise UserError(f"objective.metric: given {metric!r}; {task} has {', '.join(tasks[task])}")
    return task, metric


def score_of(report: dict[str, Any], objective: Objective) -> Score:
    """The best of the objective's methods in a report.

    Raises:
        UserError: where the report has no such task or metric, or several tasks and none is named.
    """
    tasks = report["tasks"]
    task, metric = choose_metric({name: list(about["metrics"]) for name, about in tasks.items()}, objective)
    is_higher_better = bool(tasks[task]["metrics"][metric])
    silent = [method for method in objective.method if task not in report["methods"].get(method, {})]
    if silent:
        raise UserError(f"objective.method: {', '.join(silent)} does not answer {task}; name others, or another task")
    scores = [
        Score(method, task, metric, float(report["methods"][method][task][metric]["value"]), is_higher_better)
        for method in objective.method
    ]
    return max(scores, key=lambda score: score.rank)


def best_of(scored: Sequence[tuple[Trial, Score]]) -> tuple[Trial, Score]:
    """The trial with the best score; of equals the first."""
    return max(scored, key=lambda pair: pair[1].rank)
