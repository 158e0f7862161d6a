"""The whole configuration of a run: one YAML file, `a.b=c` overrides, every problem reported at once.

The command line calls `load_config`; everything else receives the frozen `RunConfig`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator

from proper_ds.checks import check_config
from proper_ds.data.config import DataConfig
from proper_ds.distributed.config import DistributedConfig
from proper_ds.errors import ConfigError, Problem
from proper_ds.evaluation.config import EvaluationConfig, MethodRecipe, PriorConfig
from proper_ds.files import digest_of_file
from proper_ds.fleet.config import FleetConfig
from proper_ds.model.config import BaseConfig
from proper_ds.section import Section, problems_of, section_at
from proper_ds.store.config import StoreConfig
from proper_ds.study.config import ChosenBy
from proper_ds.training.config import (
    GroupConfig,
    JointConfig,
    MergeConfig,
    PloraConfig,
    PopulationConfig,
    PplugConfig,
    RouterConfig,
    StartConfig,
    UserConfig,
)

ROOT_VARIABLE = "PROPER_DS_ROOT"


class RunConfig(Section):
    """One run: data, a base, the three stages, and what to compare."""

    output_dir: str = Field(min_length=1)
    """The run's folder; on a cluster it must be on storage that all nodes share."""
    seed: int = Field(default=41, ge=0)
    data: DataConfig = DataConfig()
    base: BaseConfig = BaseConfig()
    population: PopulationConfig = PopulationConfig()
    group: GroupConfig = GroupConfig()
    start: StartConfig = StartConfig()
    user: UserConfig = UserConfig()
    adapter_sets: dict[str, dict[str, Any]] = {}
    """How the adapters of a set (`OPPU`, `proper`, `proper-released`) are optimised, where other than `user` says, in
    all lanes: `{OPPU: {learning_rate: 1.0e-3}}`. Keys are those of `user` in `OPTIMISED`."""
    router: RouterConfig = RouterConfig()
    joint: JointConfig = JointConfig()
    pplug: PplugConfig = PplugConfig()
    plora: PloraConfig = PloraConfig()
    merge: MergeConfig = MergeConfig()
    prior: PriorConfig = PriorConfig()
    distributed: DistributedConfig = DistributedConfig()
    fleet: FleetConfig = FleetConfig()
    store: StoreConfig = StoreConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    chosen_by: list[ChosenBy] = []
    """Paths of sweeps' `best.yaml`, or one: their values take the place of those in this file, and the report says
    so."""
    recipes: dict[str, MethodRecipe] = {}
    """Methods of one's own, and changes of shipped ones, by name."""

    @field_validator("chosen_by", mode="before")
    @classmethod
    def _as_list(cls, value: object) -> object:
        return [value] if isinstance(value, dict) else value or []

    def user_for(self, adapter_set: str) -> UserConfig:
        """The settings that a set's adapters are trained with, in every lane.

        Args:
            adapter_set: without its lane.
        """
        given = self.user.model_dump(exclude_unset=True) | self.adapter_sets.get(adapter_set, {})
        settings = UserConfig.model_validate(given)
        return self.start.for_users(settings) if self.starts_learned(adapter_set) else settings

    def starts_learned(self, adapter_set: str) -> bool:
        """Whether a set's adapters, in any lane, start from a learned one."""
        return adapter_set in self.learned_sets

    @property
    def output_path(self) -> Path:
        """The run's folder as a path."""
        return Path(self.output_dir)

    @property
    def learned_sets(self) -> list[str]:
        """The sets of users' adapters that start from a learned one."""
        return list(self.start.adapter_sets) if self.user.start == "learned" else []


_KINDS = {"sweep": ("parameters", "objective"), "compare": ("tasks", "variants", "vary"), "run": ("data", "evaluation")}
"""Keys at the top that only the files of one command have, `data` and `evaluation` being within `run` elsewhere."""


def check_kind(raw: dict[str, Any], command: str, source: str) -> None:
    """Raises ConfigError for the file of another command, whose keys would all be unknown here."""
    kind = next((kind for kind, keys in _KINDS.items() if set(keys) & raw.keys()), command)
    if kind != command:
        mend = f"Use `proper-ds {kind} {source}`."
        raise ConfigError(source, [Problem("(file)", f"is no file for `proper-ds {command}`", mend)])


class _StrictLoader(yaml.SafeLoader):
    """YAML without pickles, and without keys given twice."""


def _mapping_without_repeats(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is given twice; keep one", key_node.start_mark
            )
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)
# YAML 1.1 reads 1e-3 as text; people write learning rates that way.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """Parse YAML text; raises `yaml.YAMLError` for bad syntax and repeated keys."""
    return yaml.load(text, Loader=_StrictLoader)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError when there is no file, no mapping, or bad syntax."""
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [Problem("(file)", str(error), "Give the path of a run's YAML.")]) from None
    except yaml.YAMLError as error:
        wrong = " ".join(str(error).split())
        raise ConfigError(str(path), [Problem("(file)", wrong, "Mend the YAML there.")]) from None
    if not isinstance(raw, dict):
        raise ConfigError(str(path), [Problem("(file)", "holds no mapping", "Begin with `output_dir: runs/NAME`.")])
    own: dict[str, Any] = _unshared(raw)
    return own


def _unshared(value: Any) -> Any:
    """A copy in which what YAML's anchors share is several values: an override of one is none of the others."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> list[Problem]:
    """Write each `a.b=c` into `raw` (values are read as YAML) and return what could not be applied."""
    problems = []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = dotted.split(".")
        if not equals or not all(keys):
            problems.append(Problem(override, "is no override", "Write `section.key=value`."))
            continue
        try:
            value = parse_yaml(text) if text else None
        except yaml.YAMLError as error:
            wrong = f"the value {text!r} is not YAML ({' '.join(str(error).split())})"
            problems.append(Problem(dotted, wrong, "Quote it."))
            continue
        inner: Any = raw
        for key in keys[:-1]:
            if inner.get(key) is None:
                inner[key] = {}
            inner = inner[key]
            if not isinstance(inner, dict):
                break
        if isinstance(inner, dict):
            inner[keys[-1]] = value
        else:
            problems.append(Problem(dotted, "goes below a key that holds no section", "Check the dotted path."))
    return problems


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override, validate and cross-check a run's configuration.

    Relative paths are taken from the working directory, or from $PROPER_DS_ROOT where that is set.

    Raises:
        ConfigError: with every problem found, in one go.
    """
    raw = read_yaml(Path(path))
    check_kind(raw, "run", str(path))
    problems = apply_overrides(raw, overrides)
    problems += apply_chosen(raw, [override.partition("=")[0] for override in overrides])
    return validate(raw, str(path), problems)


def apply_chosen(raw: dict[str, Any], fixed: Sequence[str] = ()) -> list[Problem]:
    """Put what sweeps chose (`chosen_by`, paths) into `raw`, and on record there; returns what could not be.

    A configuration that a run wrote down has records and values already, and needs the files no more.

    Args:
        fixed: dotted keys that no choice must contradict.
    """
    given = raw.get("chosen_by") or []
    records, values, problems = list[Any](), list[dict[str, Any]](), list[Problem]()
    for one in given if isinstance(given, list) else [given]:
        if not isinstance(one, str):
            records.append(one)
            continue
        try:
            records.append(_read_choice(one))
            values.append(records[-1]["overrides"])
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            mend = "Give a best.yaml of `proper-ds sweep`."
            problems.append(Problem("chosen_by", f"{one} cannot be used ({error})", mend))
    problems += _clashes([record for record in records if isinstance(record, dict)], fixed)
    for overrides in values:
        for dotted, value in overrides.items():
            _put(raw, dotted, value)
    if given:
        raw["chosen_by"] = records
    return problems


def _clashes(records: Sequence[dict[str, Any]], fixed: Sequence[str]) -> list[Problem]:
    """Choices that contradict what is given besides, or each other."""
    known: dict[str, tuple[Any, str]] = {}
    problems = []
    for record in records:
        for dotted, value in dict(record.get("overrides") or {}).items():
            if any(_overlap(dotted, key) for key in fixed):
                mend = "Leave chosen_by out, or the override: the report would tell of a choice that was not followed."
                problems.append(Problem(dotted, "given besides chosen_by, which chose it", mend))
            for other, (theirs, path) in known.items():
                if _overlap(dotted, other) and (dotted, value) != (other, theirs):
                    wrong = f"{record.get('path')} chose {dotted}: {value!r}, {path} chose {other}: {theirs!r}"
                    problems.append(Problem("chosen_by", wrong, "Keep one of the two, or sweep them together."))
            known[dotted] = value, str(record.get("path"))
    return problems


def _read_choice(given: str) -> dict[str, Any]:
    """The record of a `best.yaml`."""
    path = Path(absolute(given))
    best = read_yaml(path)
    record = {name: best[name] for name in ("split", "method", "metric", "num_trials")}
    return record | {"path": str(path), "digest": digest_of_file(path), "overrides": dict(best["overrides"])}


def _overlap(one: str, other: str) -> bool:
    """Whether two dotted keys are the same, or one lies within the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _put(raw: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    inner = raw
    for key in sections:
        if not isinstance(inner.get(key), dict):
            inner[key] = {}
        inner = inner[key]
    if isinstance(value, dict) and section_at(RunConfig, tuple(dotted.split("."))) is not None:
        for key, part in value.items():  # sections merge, as in the sweep's trials
            _put(raw, f"{dotted}.{key}", part)
    else:
        inner[last] = value


def _not_followed(config: RunConfig) -> list[Problem]:
    """Values on record as chosen that are not the configuration's: the report would tell of another choice."""
    problems = []
    for choice in config.chosen_by:
        for dotted, value in choice.overrides.items():
            raw = config.model_dump()
            _put(raw, dotted, value)
            try:
                is_followed = _with_absolute_paths(RunConfig.model_validate(raw)) == config
            except ValidationError:
                is_followed = False
            if not is_followed:
                mend = "Put it back, or take the choice out of chosen_by."
                problems.append(Problem(dotted, f"is not {value!r}, which {choice.path} is on record to choose", mend))
    return problems


def validate(raw: dict[str, Any], source: str, problems: Sequence[Problem] = ()) -> RunConfig:
    """Turn a raw mapping into a RunConfig; see `load_config`."""
    found = list(problems)
    bad: set[str] = set()
    for _ in range(3):  # the second round checks the rest with the bad keys left out
        try:
            config = RunConfig.model_validate(raw)
            break
        except ValidationError as error:
            for loc, problem in problems_of(RunConfig, error):
                if problem.key not in bad:
                    found.append(problem)
                bad.add(problem.key)
                _repair(raw, loc)
    else:
        raise ConfigError(source, found)
    config = _with_absolute_paths(config)
    found += [problem for problem in check_config(config) if not _touches(problem, bad)]
    found += [] if found else _not_followed(config)
    if found:
        raise ConfigError(source, found)
    return config


def _repair(raw: dict[str, Any], loc: tuple[str, ...]) -> None:
    """Drop the bad key so that the rest can be checked; a missing one gets a stand-in."""
    inner: Any = raw
    for key in loc[:-1]:
        inner = inner.get(key) if isinstance(inner, dict) else None
    if isinstance(inner, dict):
        if loc[-1] in inner:
            del inner[loc[-1]]
        else:
            inner[loc[-1]] = "not-set"


def _touches(problem: Problem, bad: set[str]) -> bool:
    return any(key == problem.key or key.startswith(problem.key + ".") for key in bad)


def absolute(path: str) -> str:
    """`path` made absolute against $PROPER_DS_ROOT or the working directory."""
    root = Path(os.environ.get(ROOT_VARIABLE) or Path.cwd())
    return str((root / Path(path).expanduser()).resolve())


def _with_absolute_files(recipe: MethodRecipe) -> MethodRecipe:
    """A recipe whose files and folders are found wherever a process runs; names on the hub stay as they are."""
    prompt = dict(recipe.prompt)
    if isinstance(prompt.get("profile_file"), str):
        prompt["profile_file"] = absolute(prompt["profile_file"])
    if isinstance(prompt.get("profile_model"), str):
        prompt["profile_model"] = _folder_or_name(prompt["profile_model"])
    return recipe.model_copy(update={"prompt": prompt})


def _folder_or_name(model: str | None) -> str | None:
    """A model's folder as an absolute path; a Hugging Face name as it is."""
    if model and (Path(absolute(model)).exists() or model.startswith((".", "/", "~"))):
        return absolute(model)
    return model


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    data = config.data.model_copy(
        update={
            "path": [absolute(path) for path in config.data.path],
            "prepared": absolute(config.data.prepared) if config.data.prepared else None,
        }
    )
    base = config.base.model_copy(update={"model": _folder_or_name(config.base.model)})
    pplug = config.pplug.model_copy(update={"encoder": _folder_or_name(config.pplug.encoder)})
    deepspeed = absolute(config.distributed.deepspeed)
    uploaded = Path(config.distributed.deepspeed).expanduser().resolve()
    if not Path(deepspeed).exists() and uploaded.exists():  # in a job, ds_configs/ comes with the upload
        deepspeed = str(uploaded)
    distributed = config.distributed.model_copy(update={"deepspeed": deepspeed})
    store = config.store
    if store.location is not None and "://" not in store.location:
        store = store.model_copy(update={"location": absolute(store.location)})
    return config.model_copy(
        update={
            "store": store,
            "output_dir": absolute(config.output_dir),
            "recipes": {name: _with_absolute_files(recipe) for name, recipe in config.recipes.items()},
            "data": data,
            "base": base,
            "pplug": pplug,
            "distributed": distributed,
        }
    )
