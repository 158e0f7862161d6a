"""Reads study and sweep files: YAML, `a.b=c` overrides, every problem at once. The command line calls it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from proper_ds.config import absolute, apply_overrides, check_kind, read_yaml
from proper_ds.errors import ConfigError, Problem
from proper_ds.section import problems_of
from proper_ds.study.config import OWN_KEYS, Common, StudyConfig, SweepConfig
from proper_ds.study.merge import merged

Kind = TypeVar("Kind", bound=Common)


def load_study(path: Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """A study file. Raises ConfigError with every problem found."""
    return _load(StudyConfig, "compare", path, overrides)


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """A sweep file. Raises ConfigError with every problem found."""
    return _load(SweepConfig, "sweep", path, overrides)


def _load(kind: type[Kind], command: str, path: Path, overrides: Sequence[str]) -> Kind:
    raw = read_yaml(path)
    check_kind(raw, command, str(path))
    if isinstance(raw.get("run"), str):
        raw["run"] = _read_run(str(raw["run"]), path)
    for key in ("tasks", "variants"):
        if isinstance(raw.get(key), dict):
            raw[key] = {name: _nested(changes) for name, changes in raw[key].items()}
    problems = apply_overrides(raw, overrides)
    try:
        config = kind.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(str(path), problems + [_named(problem) for _, problem in problems_of(kind, error)]) from None
    if problems:
        raise ConfigError(str(path), problems)
    return config.model_copy(update={"output_dir": absolute(config.output_dir)})


def _nested(changes: Any) -> Any:
    """Changes without dotted keys, so that an override finds what it is to change."""
    return merged(changes) if isinstance(changes, dict) else changes


def _named(problem: Problem) -> Problem:
    """A problem of the file as a whole carries all of the file as what was given: say only what is wrong."""
    return problem if problem.key else Problem("(file)", "contradicts itself", problem.mend)


def _read_run(given: str, study: Path) -> dict[str, Any]:
    """A run's YAML without the keys that the study gives each run."""
    places = [Path(absolute(given)), Path(given), study.parent / given]
    raw = read_yaml(next((place for place in places if place.exists()), places[0]))
    return {key: value for key, value in raw.items() if key not in OWN_KEYS}
