"""Which settings of a study or sweep can change an answer: what cannot is refused before anything runs.

Two configurations whose answers have the same fingerprints give the same numbers, whatever else differs between them.
`plan.py` and `trials.py` call it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from proper_ds.config import RunConfig
from proper_ds.errors import ConfigError, Problem
from proper_ds.pipeline.stages import ANSWERING, StageList


def answers_of(config: RunConfig) -> tuple[str, ...]:
    """Fingerprints of a run's answers, to be compared with those of another configuration; no data is read."""
    plain = config.model_copy(update={"user": config.user.model_copy(update={"only_changed": False})})
    return tuple(stage.fingerprint for stage in StageList(plain, sources=()).of(*ANSWERING))


def same_answers(configs: Mapping[str, RunConfig]) -> list[list[str]]:
    """Names of configurations, several at a time, whose answers must be the same."""
    by_answers: dict[tuple[str, ...], list[str]] = {}
    for name, config in configs.items():
        by_answers.setdefault(answers_of(config), []).append(name)
    return [names for names in by_answers.values() if len(names) > 1]


def idle_parameters(points: Sequence[Mapping[str, Any]], make: Callable[[dict[str, Any]], RunConfig]) -> list[Problem]:
    """Parameters of a sweep that change no answer in any of its points, whatever else is set there.

    Args:
        make: the configuration of a point; may raise ConfigError for one that is no trial.
    """
    problems = []
    for key in points[0] if points else ():
        values = [point[key] for point in points]
        if any(value != values[0] for value in values) and not _has_effect(key, points, make):
            wrong = "has no effect on what the objective's methods answer"
            mend = "Remove it, or name a method in objective.method that depends on it."
            problems.append(Problem(f"parameters.{key}", wrong, mend))
    return problems


def _has_effect(key: str, points: Sequence[Mapping[str, Any]], make: Callable[[dict[str, Any]], RunConfig]) -> bool:
    for point in points:
        other = next(rival[key] for rival in points if rival[key] != point[key])
        try:
            if answers_of(make(dict(point))) != answers_of(make({**point, key: other})):
                return True
        except ConfigError:  # the two values do not go with the same others, so they do not mean the same
            return True
    return False
