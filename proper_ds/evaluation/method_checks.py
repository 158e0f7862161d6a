"""Checks of what belongs to PPlug, PLoRA, merged adapters and the learned start; `proper_ds.checks` calls them."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import ValidationError

from proper_ds.errors import Problem
from proper_ds.evaluation.methods import ADAPTER_SETS, FLOORS, needs_of
from proper_ds.model.config import NUM_PERSONAL
from proper_ds.section import is_changed, problems_of
from proper_ds.training.config import OPTIMISED, REPLACED, UserConfig

if TYPE_CHECKING:
    from proper_ds.config import RunConfig


def check_floors(config: RunConfig) -> list[Problem]:
    """Everything wrong with methods that need no language model."""
    evaluation, problems = config.evaluation, []
    if not needs_of(config).floors and is_changed(evaluation, "max_floor_examples"):
        mend = f"Remove it, or add {' or '.join(FLOORS)} to evaluation.methods."
        problems.append(Problem("evaluation.max_floor_examples", "has no effect without such methods", mend))
    return problems


def _check_priors(config: RunConfig) -> list[Problem]:
    """Everything wrong with methods that have a label prior, and with section `prior`."""
    if not needs_of(config).priors:
        mend = "Remove it, or evaluate population+prior or group+prior."
        changed = [name for name in sorted(type(config.prior).model_fields) if is_changed(config.prior, name)]
        return [Problem(f"prior.{name}", "has no effect without a method with a label prior", mend) for name in changed]
    if config.evaluation.closed_labels == "generate":
        wrong = "generated answers have no likelihoods that a label prior could weigh"
        mend = "Leave out methods that end in +prior, or set `evaluation.closed_labels: score`."
        return [Problem("evaluation.closed_labels", wrong, mend)]
    return []


def check_rivals(config: RunConfig) -> list[Problem]:
    """Everything wrong with sections `pplug`, `plora`, `merge` and `prior` that no single value shows."""
    needs, pplug, problems = needs_of(config), config.pplug, _check_priors(config)
    owners = [
        ("pplug", pplug, "PPlug", bool(needs.pplugs)),
        ("plora", config.plora, "PLoRA", needs.plora),
        ("merge", config.merge, "merged", needs.merged),
    ]
    for name, section, method, is_needed in owners:
        for key in sorted(type(section).model_fields) if not is_needed else ():
            if is_changed(section, key):
                wrong = f"has no effect without method {method}"
                mend = "Remove it, or add the method to evaluation.methods."
                problems.append(Problem(f"{name}.{key}", wrong, mend))
    for key in ("encoder_revision", "pooling", "query_prefix") if pplug.encoder is None else ():
        if is_changed(pplug, key):
            wrong, mend = "has no effect without pplug.encoder", "Remove it, or name a sentence encoder."
            problems.append(Problem(f"pplug.{key}", wrong, mend))
    create, length = config.base.create, config.base.max_length
    if create is not None and needs.pplugs and length + NUM_PERSONAL > create.max_position_embeddings:
        wrong = f"{length} leaves no room for PPlug's {NUM_PERSONAL} tokens before the input"
        mend = f"Lower it, or raise base.create.max_position_embeddings to {length + NUM_PERSONAL}."
        problems.append(Problem("base.max_length", wrong, mend))
    if config.merge.num_neighbours > config.merge.num_anchors:
        wrong = f"{config.merge.num_neighbours} is more than merge.num_anchors {config.merge.num_anchors}"
        problems.append(Problem("merge.num_neighbours", wrong, "Lower it, or raise num_anchors."))
    return problems


def check_start(config: RunConfig) -> list[Problem]:
    """Everything wrong with section `start` and `user.start`."""
    key, user, needs, problems = "user.start", config.user, needs_of(config), []
    if user.start == "fresh":
        mend = "Remove it, or set `user.start: learned`."
        changed = [name for name in sorted(type(config.start).model_fields) if is_changed(config.start, name)]
        return [Problem(f"start.{name}", "has no effect without a learned start", mend) for name in changed]
    sets = config.start.adapter_sets
    if not needs.starts:
        mend = "Remove it, or evaluate a method with such adapters (start.adapter_sets)."
        problems.append(Problem(key, f"has no effect: no method has adapters of {', '.join(sets)}", mend))
    elif idle := [name for name in sets if name not in needs.starts]:
        mend = "Leave it out, or evaluate a method that has them."
        problems.append(Problem("start.adapter_sets", f"no method has adapters of {', '.join(idle)}", mend))
    own = {f"adapter_sets.{name}": config.adapter_sets.get(name, {}) for name in needs.starts}
    for key, value in (
        ("user.rank_by_history", user.rank_by_history),
        ("user.early_stopping_patience", user.early_stopping_patience),
        *((f"{at}.early_stopping_patience", given.get("early_stopping_patience")) for at, given in own.items()),
    ):
        if value is not None:
            wrong = "cannot work with a learned start, which is of one rank and knows how far the training goes"
            problems.append(Problem(key, wrong, "Remove it, or set `user.start: fresh`."))
    for at, given in own.items():
        for name in (name for name in REPLACED if name in given):
            wrong, mend = "has no effect with a learned start", f"Remove it, or set start.user_{name}."
            problems.append(Problem(f"{at}.{name}", wrong, mend))
    for name in REPLACED if set(needs.adapter_sets) == set(needs.starts) else ():
        if is_changed(user, name):
            mend = f"Remove it, or set start.user_{name}."
            problems.append(Problem(f"user.{name}", "has no effect: all adapters start from the learned start", mend))
    return problems


def check_adapter_sets(config: RunConfig) -> list[Problem]:
    """Sets of `adapter_sets` that are none, or that nobody needs."""
    needed, problems = needs_of(config).adapter_sets, []
    for name, changes in config.adapter_sets.items():
        key = f"adapter_sets.{name}"
        if name not in ADAPTER_SETS:
            mend = f"Sets are {', '.join(ADAPTER_SETS)}; each is meant in all lanes."
            problems.append(Problem(key, "no such set of adapters", mend))
        elif name not in needed:
            mend = f"Remove it, or evaluate a method that has adapters of set {name}."
            problems.append(Problem(key, "has no effect: no method of evaluation.methods needs the set", mend))
        elif not changes:
            problems.append(Problem(key, "changes nothing", "Remove it, or say what differs from `user`."))
    return problems


def check_set_values(config: RunConfig) -> list[Problem]:
    """Keys and values of `adapter_sets` that a set cannot have."""
    problems = []
    for name, changes in config.adapter_sets.items():
        at = f"adapter_sets.{name}"
        for key in sorted(changes.keys() - set(OPTIMISED)):
            near = difflib.get_close_matches(key, OPTIMISED, n=1)
            mend = f"Did you mean `{near[0]}`? " if near else ""
            mend += f"A set can have {', '.join(OPTIMISED)} of its own."
            wrong = "is the same for all sets" if key in UserConfig.model_fields else "unknown key"
            problems.append(Problem(f"{at}.{key}", wrong, mend))
        try:
            UserConfig.model_validate({key: value for key, value in changes.items() if key in OPTIMISED})
        except ValidationError as error:
            found = [problem for _, problem in problems_of(UserConfig, error)]
            problems += [replace(problem, key=f"{at}.{problem.key}") for problem in found]
    return problems
