"""What a study file and a sweep file hold; `load.py` reads them, `plan.py` and `trials.py` make runs of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from proper_ds.section import Section

Changes = dict[str, Any]
"""What differs from `run`: sections as in a run's YAML, or dotted keys (`group.num_experts: 3`)."""
GENERATED_FOLDER = "data"
"""Below the study's folder: what it generated, by task."""
_SAFE = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._=,+-")
OWN_KEYS = ("output_dir", "seed")
"""Keys of a run that a study or sweep gives each run itself."""


def _no_mapping(value: object) -> object:
    return {} if value is None else value  # `main:` with nothing after it


Overrides = Annotated[Changes, BeforeValidator(_no_mapping)]


def is_name(value: str) -> bool:
    """Whether a name can be a folder's, anywhere."""
    return bool(value) and value[0].isalnum() and _SAFE.issuperset(value)


def _check_names(names: list[str], what: str) -> None:
    wrong = [name for name in names if not is_name(name)]
    if wrong:
        raise ValueError(f"{', '.join(map(repr, wrong))}: {what} are folder names; use letters, digits and . _ = , + -")


class GeneratedData(Section):
    """Data that the study generates itself, as `proper-ds data generate` does: its groups are known."""

    num_users: int = Field(ge=4)
    num_groups: int = Field(default=4, ge=1)
    seed: int = Field(default=1, ge=0)


class ChosenBy(Section):
    """The record, in a run's configuration, of a choice that a sweep made for it."""

    path: str
    """Of the sweep's `best.yaml`."""
    digest: str
    """Of that file as it was read."""
    overrides: Changes
    split: str
    """Whose users the choice was made on."""
    method: str
    metric: str
    num_trials: int


class Common(Section):
    """What studies and sweeps share."""

    output_dir: str = Field(min_length=1)
    """Below it each run has a folder of its own."""
    run: Changes = {}
    """A run's configuration, or the path of a run's YAML (from the working directory or from this file's folder)."""
    base: str | None = None
    """`base.model` of every run."""

    @field_validator("run")
    @classmethod
    def _without_own(cls, value: Changes) -> Changes:
        own = [key for key in OWN_KEYS if key in value]
        if own:
            raise ValueError(f"remove {', '.join(own)}, which each run is given")
        return value


class StudyConfig(Common):
    """`proper-ds compare`: tasks x variants x seeds, each a run."""

    data_root: str | None = None
    """A task without data of its own reads the folder of its name in here."""
    tasks: dict[str, Overrides] = Field(min_length=1)
    generate: dict[str, GeneratedData] = {}
    """By task: data to generate for it."""
    variants: dict[str, Overrides] = {}
    """Named changes. Without any there is `main`, which changes nothing."""
    vary: dict[str, list[Any] | dict[str, Overrides]] = {}
    """Factors: a key of a run with a list of values, or any name with named changes."""
    vary_on: Literal["one-at-a-time", "grid"] = "one-at-a-time"
    """Each value of each factor on its own, or all combinations."""
    seeds: list[Annotated[int, Field(ge=0)]] = [41]

    @model_validator(mode="after")
    def _sound(self) -> StudyConfig:
        _check_names([*self.tasks, *self.variants], "tasks and variants")
        if GENERATED_FOLDER in self.tasks:
            raise ValueError(f"no task can be called {GENERATED_FOLDER!r}: what the study generates lies there")
        unknown = sorted(set(self.generate) - set(self.tasks))
        if unknown:
            raise ValueError(f"generate names {', '.join(unknown)}, which tasks does not have")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError("give at least one of seeds, each once")
        empty = [name for name, levels in self.vary.items() if not levels]
        if empty:
            raise ValueError(f"vary: {', '.join(empty)} has no values")
        return self


class Range(Section):
    """Numbers between two bounds, both included."""

    low: float
    high: float
    log: bool = False
    """Evenly spread in the logarithm."""
    integer: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high:
            raise ValueError("low must be below high")
        if self.log and self.low <= 0:
            raise ValueError("low must be above 0 with log")
        return self


class Objective(Section):
    """The number that a sweep makes best, and the users it is taken from."""

    method: Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = Field(
        min_length=1
    )
    """Trials evaluate these and nothing else. With several, such as two routers, the best of them is part of the
    choice."""
    metric: str = "auto"
    """`auto`: the task's first."""
    task: str | None = None
    """Needed where the data has several."""
    split: str = "dev"
    """Never `test`: choices are made on other users than those that are reported."""

    @field_validator("split")
    @classmethod
    def _no_test(cls, value: str) -> str:
        if value == "test":
            raise ValueError("choices are never made on test users; give `dev` or `tune`")
        return value


class SweepConfig(Common):
    """`proper-ds sweep`: trials of one run's configuration, the best of them written to `best.yaml`."""

    seed: int = Field(default=41, ge=0)
    """Of every trial's run."""
    objective: Objective
    parameters: dict[str, list[Any] | Range] = Field(min_length=1)
    """By key of a run (`group.num_experts`): the values to try, or a range to draw from."""
    search: Literal["grid", "random"] = "grid"
    num_trials: int | None = Field(default=None, ge=1)
    """With `random`: how many different trials."""
    search_seed: int = Field(default=0, ge=0)
    """Of the draws."""
    max_concurrent: int = Field(default=1, ge=1)
    """Trials at the same time, each with an equal share of the cluster."""

    @model_validator(mode="after")
    def _sound(self) -> SweepConfig:
        own = [key for key in self.parameters if key in OWN_KEYS or key.startswith("evaluation.split")]
        if own:
            raise ValueError(f"parameters: {', '.join(own)} cannot be swept")
        empty = [name for name, values in self.parameters.items() if isinstance(values, list) and not values]
        if empty:
            raise ValueError(f"parameters: {', '.join(empty)} has no values")
        ranges = [name for name, values in self.parameters.items() if isinstance(values, Range)]
        if self.search == "grid" and ranges:
            raise ValueError(f"parameters: a grid needs lists of values, and {', '.join(ranges)} has a range")
        if (self.num_trials is None) != (self.search == "grid"):
            raise ValueError("give num_trials with search `random`, and only there")
        return self
