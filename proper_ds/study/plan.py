"""From a study file to its runs: tasks x variants x seeds, each with a checked configuration and its own folder."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proper_ds.config import RunConfig, absolute, apply_chosen, validate
from proper_ds.data.manifest import Manifest
from proper_ds.data.sources import find_sources
from proper_ds.errors import ConfigError, Problem, ProperError
from proper_ds.pipeline.plan import skeleton
from proper_ds.study.config import GENERATED_FOLDER, OWN_KEYS, Changes, StudyConfig, is_name
from proper_ds.study.effects import same_answers
from proper_ds.study.merge import dotted_keys, merged, without_model

MAIN = "main"
_IN_A_STUDY = {"base.model": "`base=NAME_OR_FOLDER`", "data.path": "`data_root=FOLDER`, with a folder for each task"}
GENERATED_TASKS = ("generated_tags", "generated_ratings")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study."""

    task: str
    variant: str
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        """Its place below the study's folder, which is what people call it."""
        return "/".join(self.config.output_path.parts[-2:])


def variants_of(study: StudyConfig) -> dict[str, Changes]:
    """Every variant by name, in order: those that are named, then those that `vary` makes.

    Raises:
        ConfigError: where two have one name, or a value makes no folder name.
    """
    found = dict(study.variants)
    factors = [[(name, label, change) for label, change in _levels(name, given)] for name, given in study.vary.items()]
    if study.vary_on == "grid" and factors:
        made = [
            (",".join(f"{name}={label}" for name, label, _ in levels), merged(*(change for *_, change in levels)))
            for levels in itertools.product(*factors)
        ]
    else:
        found = found or {MAIN: {}}
        made = [(f"{name}={label}", change) for levels in factors for name, label, change in levels]
    problems = []
    for name, change in made:
        if name in found:
            problems.append(Problem("vary", f"{name} is made twice", "Give each value once."))
        if not is_name(name):
            mend = "Name the changes: `{NAME: {KEY: VALUE}}` instead of a list of values."
            problems.append(Problem("vary", f"{name!r} is no folder name", mend))
        found[name] = change
    if problems:
        raise ConfigError("study", problems)
    return found


def _levels(name: str, given: list[Any] | dict[str, Changes]) -> list[tuple[str, Changes]]:
    if isinstance(given, dict):
        return list(given.items())
    return [(re.sub(r"[\s'\"\[\]]+", "", str(value)), {name: value}) for value in given]


def plan_runs(study: StudyConfig, source: str) -> list[PlannedRun]:
    """All runs, by task, then variant, then seed: what a run can adopt was mostly made just before it.

    Raises:
        ConfigError: with every problem of every run's configuration; one that many runs share is told once.
    """
    variants = variants_of(study)
    planned: list[PlannedRun] = []
    by_problem: dict[str, tuple[Problem, list[str]]] = {}
    for task, variant, seed in itertools.product(study.tasks, variants, study.seeds):
        name = f"{task}/{folder_of(variant, seed, study.seeds)}"
        try:
            config = _config(study, task, variants[variant], seed, Path(study.output_dir) / name)
        except ConfigError as error:
            for problem in error.problems:
                by_problem.setdefault(str(problem), (problem, []))[1].append(name)
        else:
            planned.append(PlannedRun(task, variant, seed, config))
    problems = [_of_runs(problem, names) for problem, names in by_problem.values()] + _same_folders(planned)
    if problems:
        raise ConfigError(source, problems)
    _check_inputs(planned, source, set(study.generate))
    if idle := _unread_root(study, planned) + _same_variants(planned):
        raise ConfigError(source, idle)
    return planned


def _unread_root(study: StudyConfig, planned: Sequence[PlannedRun]) -> list[Problem]:
    """A `data_root` that no run reads."""
    if study.data_root is None:
        return []
    root = Path(absolute(study.data_root))
    if any(str(root / run.task) in (run.config.data.path or []) for run in planned):
        return []
    wrong = f"{study.data_root}: no task reads it, each has data of its own or generates them"
    return [Problem("data_root", wrong, "Leave it out, or remove data.path, data.prepared or generate of a task.")]


def _same_variants(planned: Sequence[PlannedRun]) -> list[Problem]:
    """Variants that give the same answers as another, in every task."""
    by_task: dict[str, dict[str, RunConfig]] = {}
    for run in planned:
        by_task.setdefault(run.task, {}).setdefault(run.variant, run.config)
    same = [
        {tuple(sorted(pair)) for names in same_answers(configs) for pair in itertools.combinations(names, 2)}
        for configs in by_task.values()
    ]
    wrong = "would give the same answers in all tasks: nothing that differs has an effect"
    mend = "Remove one, or evaluate a method that depends on what differs."
    return [Problem(" and ".join(pair), wrong, mend) for pair in sorted(set.intersection(*same))]


def folder_of(variant: str, seed: int, seeds: list[int]) -> str:
    """A run's folder below its task's: seeds after the first are named, so that a seed can be added later."""
    return variant if seed == seeds[0] else f"{variant}-{seed}"


def _same_folders(planned: Sequence[PlannedRun]) -> list[Problem]:
    """Runs that would overwrite each other, such as variant `main-42` and the second seed, 42, of `main`."""
    by_folder: dict[Path, list[PlannedRun]] = {}
    for run in planned:
        by_folder.setdefault(run.config.output_path, []).append(run)
    return [
        Problem(
            runs[0].name,
            "is the folder of " + " and of ".join(f"variant {run.variant}, seed {run.seed}" for run in runs),
            "Give the variant another name.",
        )
        for runs in by_folder.values()
        if len(runs) > 1
    ]


def _of_runs(problem: Problem, names: list[str]) -> Problem:
    runs = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more runs"
    here = _IN_A_STUDY.get(problem.key, f"`run.{problem.key}`, of one task `tasks.NAME.{problem.key}`")
    return Problem(f"{runs}: {problem.key}", problem.wrong, f"{problem.mend} (In a study it is {here}.)")


def _config(study: StudyConfig, task: str, change: Mapping[str, Any], seed: int, folder: Path) -> RunConfig:
    layers = [dict(study.tasks[task]), dict(change)]
    own = [key for key in OWN_KEYS for layer in layers if key in layer]
    if own:
        mend = "The study gives each run its folder and seed: use `output_dir` and `seeds` at the top."
        raise ConfigError("study", [Problem(key, "given for one run", mend) for key in own])
    given = merged(study.run)
    if study.base is not None:
        given = without_model(given) | {"base.model": study.base}
    if task in study.generate:
        data = Path(study.output_dir) / GENERATED_FOLDER / task
        given = merged(given, {"data.path": [str(data / name) for name in GENERATED_TASKS]})
    raw = merged(given, *layers)
    data_section = raw.get("data") or {}
    if study.data_root is not None and not {"path", "prepared"} & data_section.keys():
        raw = merged(raw, {"data.path": [str(Path(absolute(study.data_root)) / task)]})
    raw = merged(raw, {"output_dir": str(folder), "seed": seed})
    return validate(raw, "study", apply_chosen(raw, dotted_keys(change)))


def _check_inputs(planned: list[PlannedRun], source: str, generated: set[str]) -> None:
    """Raise ConfigError where data or a base of any run cannot be found."""
    problems: dict[str, Problem] = {}
    checked: set[str] = set()
    for run in planned:
        data, base = run.config.data, run.config.base
        key = f"{run.task}: data.path {data.path}"
        if data.path and run.task not in generated and key not in problems:
            try:
                find_sources(data)
            except ProperError as error:
                problems[key] = Problem(f"{run.task}: data.path", str(error), "Give data_root, or the task its own.")
        if data.prepared is not None and not data.path and (key := f"prepared {data.prepared}") not in problems:
            try:
                Manifest.read(Path(data.prepared))
            except ProperError as error:
                mend = "Give the folder that `proper-ds data prepare` wrote."
                problems[key] = Problem(f"{run.task}: data.prepared", str(error), mend)
        if base.model and base.model not in checked | problems.keys():
            try:
                skeleton(run.config)
                checked.add(base.model)
            except ProperError as error:
                problems[base.model] = Problem("base.model", str(error), "Give base=NAME_OR_FOLDER.")
    if problems:
        raise ConfigError(source, list(problems.values()))
