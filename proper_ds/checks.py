"""The one place of checks across sections: contradictions, and options that would have no effect.

`check_config` is called by `proper_ds.config` on a configuration whose single values are legal.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from proper_ds.data.recipe import recipe_problems
from proper_ds.distributed.config import DistributedConfig
from proper_ds.distributed.ds_config import read_ds_file, resolve_ds, zero_stage
from proper_ds.errors import Problem
from proper_ds.evaluation.method_checks import (
    check_adapter_sets,
    check_floors,
    check_rivals,
    check_set_values,
    check_start,
)
from proper_ds.evaluation.methods import METHODS, all_methods, changed_recipe, methods_of, needs_of
from proper_ds.model.config import BaseConfig
from proper_ds.section import is_changed
from proper_ds.training.config import PROPER_ONLY, OptimSettings, RankTraining, UserConfig
from proper_ds.training.schedule import wrong_kwargs

if TYPE_CHECKING:
    from proper_ds.config import RunConfig


def check_config(config: RunConfig) -> list[Problem]:
    """Everything wrong with a configuration that no single value shows."""
    return [
        *_data(config),
        *_base(config.base),
        *_global_batches(config),
        *_packing(config),
        *_experts(config),
        *_schedules(config),
        *_users(config),
        *_early_stopping(config),
        *_batches(config),
        *_recipes(config),
        *_methods(config),
        *check_rivals(config),
        *check_start(config),
        *check_adapter_sets(config),
        *check_set_values(config),
        *_update(config),
        *_ranks(config.distributed),
        *_deepspeed(config),
    ]


def _data(config: RunConfig) -> list[Problem]:
    data, problems = config.data, []
    if not data.path and data.prepared is None:
        mend = "Give `data.path=FOLDER` (LaMP's format, JSONL, Parquet) or `data.prepared=FOLDER`."
        problems.append(Problem("data.path", "not set", mend))
    if data.path and data.prepared is not None:
        problems.append(Problem("data.prepared", "given together with data.path", "Keep one of the two."))
    if data.prepared is not None and not data.path:
        used = {"prepared", "train_split"}
        idle = sorted(name for name in data.model_fields_set - used if is_changed(data, name))
        mend = "It belongs to `proper-ds data prepare`; remove it here."
        problems += [Problem(f"data.{name}", "has no effect on prepared data", mend) for name in idle]
    taught = [name for name, stage in trained_stages(config) if "queries" in stage.train_on]
    ways = [f"set `train_on: [history]` in {', '.join(taught)}"] * bool(taught)
    ways += ["leave out methods that end in +prior"] * bool(needs_of(config).priors)
    if data.train_split == config.evaluation.split and ways:
        wrong = f"{data.train_split!r} is also data.train_split, whose answers are trained on"
        problems.append(Problem("evaluation.split", wrong, f"Evaluate on another split, or {' and '.join(ways)}."))
    return problems


def _base(base: BaseConfig) -> list[Problem]:
    problems = []
    if (base.model is None) == (base.create is None):
        wrong = "given together with base.create" if base.model else "not set"
        mend = "Give a Hugging Face name or folder as `base.model`, or a `base.create` section, one of the two."
        problems.append(Problem("base.model", wrong, mend))
    if base.revision is not None and base.model is None:
        problems.append(Problem("base.revision", "has no effect without base.model", "Remove it."))
    create = base.create
    if create is not None:
        if create.hidden_size % create.num_attention_heads:
            wrong = f"{create.hidden_size} is no multiple of num_attention_heads {create.num_attention_heads}"
            problems.append(Problem("base.create.hidden_size", wrong, "Change one of the two."))
        elif (create.hidden_size // create.num_attention_heads) % 2:
            wrong = "makes heads of odd width, which rotary positions cannot use"
            problems.append(Problem("base.create.hidden_size", wrong, "Change it or num_attention_heads."))
        if create.max_position_embeddings < base.max_length:
            wrong = f"{create.max_position_embeddings} is below base.max_length {base.max_length}"
            problems.append(Problem("base.create.max_position_embeddings", wrong, "Raise it or lower max_length."))
    return problems


def _rank_stages(config: RunConfig) -> list[tuple[str, RankTraining]]:
    return [
        ("population", config.population),
        ("group", config.group),
        ("start", config.start),
        ("router", config.router),
        ("joint", config.joint),
        ("pplug", config.pplug),
        ("plora", config.plora),
    ]


def trained_stages(config: RunConfig) -> list[tuple[str, RankTraining]]:
    """Those of the stages on ranks that the methods need."""
    needs = needs_of(config)
    is_needed = {
        "population": needs.population,
        "group": bool(needs.presets),
        "start": bool(needs.starts),
        "router": bool(needs.routers),
        "joint": bool(needs.joints),
        "pplug": bool(needs.pplugs),
        "plora": needs.plora,
    }
    return [(name, stage) for name, stage in _rank_stages(config) if is_needed[name]]


def _global_batches(config: RunConfig) -> list[Problem]:
    num_ranks, problems = config.distributed.num_ranks, []
    for name, stage in _rank_stages(config):
        if stage.train_batch_size is None:
            continue
        if stage.gradient_accumulation_steps != 1:
            wrong, mend = f"has no effect with {name}.train_batch_size, which says how often", "Keep one of the two."
            problems.append(Problem(f"{name}.gradient_accumulation_steps", wrong, mend))
        if stage.train_batch_size < num_ranks:
            wrong = f"{stage.train_batch_size} leaves some of distributed.num_ranks {num_ranks} without an example"
            problems.append(Problem(f"{name}.train_batch_size", wrong, "Raise it, or use fewer ranks."))
    return problems


def _packing(config: RunConfig) -> list[Problem]:
    wrong = "has no effect with per_device_train_batch_size 1: there is nothing to put into one row"
    return [
        Problem(f"{name}.packing", wrong, "Remove it, or raise the batch size.")
        for name, stage in (("population", config.population), ("group", config.group))
        if stage.packing and stage.per_device_train_batch_size == 1
    ]


def _experts(config: RunConfig) -> list[Problem]:
    group, distributed, problems = config.group, config.distributed, []
    presets = needs_of(config).presets
    size = distributed.expert_parallel_size
    if size > 1 and distributed.num_ranks % size:
        wrong = f"{size} does not divide distributed.num_ranks {distributed.num_ranks}"
        problems.append(Problem("distributed.expert_parallel_size", wrong, "Choose a divisor of the ranks."))
    if size > 1 and group.num_experts % size:
        wrong = f"{size} does not divide group.num_experts {group.num_experts}"
        problems.append(Problem("distributed.expert_parallel_size", wrong, "Every rank holds as many experts."))
    if size > 1 and not presets:
        mend = "Remove it, or evaluate a method with groups."
        problems.append(Problem("distributed.expert_parallel_size", "has no effect without experts", mend))
    if group.top_k is not None and group.top_k >= group.num_experts:
        wrong = f"{group.top_k} of {group.num_experts} experts leaves none out"
        problems.append(Problem("group.top_k", wrong, "Lower it, or leave it out for PROPER's dense routing."))
    if group.num_blocks is not None:
        problems += _blocks(config)
    for name in sorted(PROPER_ONLY) if presets and "proper" not in presets else []:
        if not is_changed(group, name):
            continue
        mend = "Remove it, or evaluate a method of preset proper."
        problems.append(Problem(f"group.{name}", "has no effect on proper-released", mend))
    if group.user_vector == "table":
        for name in (name for name in ("history_dropout", "users") if is_changed(group, name)):
            problems.append(Problem(f"group.{name}", "has no effect with group.user_vector table", "Remove it."))
        if "history" not in group.train_on and "proper" in presets:
            wrong = "without `history`, but the user table has a row for each user, and would leave most untrained"
            problems.append(Problem("group.train_on", wrong, "Add `history`, or use the encoder."))
    return problems


def _blocks(config: RunConfig) -> list[Problem]:
    group, key, problems = config.group, "group.num_blocks", []
    size = config.distributed.expert_parallel_size
    assert group.num_blocks is not None
    if group.top_k is not None:
        problems.append(Problem(key, "given together with group.top_k", "Keep one of the two ways of leaving out."))
    if group.user_vector == "table":
        mend = "Use the encoder: blocks are made by likeness of histories."
        problems.append(Problem(key, "cannot work with group.user_vector table", mend))
    if group.num_experts % group.num_blocks:
        wrong = f"{group.num_blocks} does not divide group.num_experts {group.num_experts}"
        problems.append(Problem(key, wrong, "Every block has as many experts."))
    elif group.num_blocks % size:
        wrong = f"is no multiple of distributed.expert_parallel_size {size}"
        problems.append(Problem(key, f"{group.num_blocks} {wrong}", "Every rank holds as many blocks."))
    return problems


def _schedules(config: RunConfig) -> list[Problem]:
    stages: list[tuple[str, OptimSettings]] = [*_rank_stages(config), *_user_stages(config)]
    problems = []
    for name, stage in stages:
        problems += [Problem(f"{name}.lr_scheduler_kwargs", wrong, mend) for wrong, mend in wrong_kwargs(stage)]
        without = stage.lr_scheduler_type == "constant"
        for key in ("warmup_ratio", "warmup_steps"):
            if without and key in stage.model_fields_set and getattr(stage, key):
                wrong, mend = (
                    "has no effect with lr_scheduler_type `constant`",
                    "Remove it, or use `constant_with_warmup`.",
                )
                problems.append(Problem(f"{name}.{key}", wrong, mend))
        if stage.warmup_steps is not None and "warmup_ratio" in stage.model_fields_set and stage.warmup_ratio:
            problems.append(Problem(f"{name}.warmup_ratio", "given together with warmup_steps", "Keep one of the two."))
    return problems


def _user_stages(config: RunConfig) -> list[tuple[str, UserConfig]]:
    """How users' adapters are trained, and how those of each set that has legal settings of its own."""
    wrong = {problem.key.split(".")[1] for problem in check_set_values(config)}
    own = [(f"adapter_sets.{name}", config.user_for(name)) for name in config.adapter_sets if name not in wrong]
    return [("user", config.user), *own]


def _early_stopping(config: RunConfig) -> list[Problem]:
    found: dict[str, Problem] = {}
    for name, user in _user_stages(config):
        patience = user.early_stopping_patience
        if user.early_stopping_threshold and patience is None:
            key, wrong = f"{name}.early_stopping_threshold", "has no effect without early_stopping_patience"
            found.setdefault(wrong, Problem(key, wrong, "Set that, too, or remove it."))
        if patience is not None and not user.min_steps and user.num_train_epochs < patience + 2:
            wrong = f"{patience} can stop nobody in {user.num_train_epochs} epochs: the first sets the mark"
            mend = f"Train at least {patience + 2} epochs, or lower it."
            found.setdefault(wrong, Problem(f"{name}.early_stopping_patience", wrong, mend))
    return list(found.values())


def _users(config: RunConfig) -> list[Problem]:
    user, problems = config.user, []
    ranks = user.rank_by_history
    if ranks is not None and max(ranks.values()) != user.lora.r:
        wrong = f"goes up to rank {max(ranks.values())}, but user.lora.r is {user.lora.r}"
        problems.append(Problem("user.rank_by_history", wrong, "Make the largest rank equal to user.lora.r."))
    newest = user.max_history_items
    beyond = sorted(least for least in ranks or {} if newest is not None and least > newest)
    if beyond:
        wrong = f"has ranks from {beyond} items on, but user.max_history_items is {newest}"
        problems.append(Problem("user.rank_by_history", wrong, "Remove those, or raise max_history_items."))
    if user.cache_bytes not in (0, UserConfig.model_fields["cache_bytes"].get_default()):
        if not user.lora.layers or min(user.lora.layers) == 0:
            mend = "Leave the lowest layers out of user.lora.layers, or remove it."
            problems.append(Problem("user.cache_bytes", "has no effect where layer 0 is adapted", mend))
        elif user.num_train_epochs == 1 and not user.min_steps:
            mend = "Remove it, or train more epochs."
            problems.append(Problem("user.cache_bytes", "has no effect in a single epoch", mend))
        elif user.lora.lora_dropout or config.group.lora.lora_dropout:
            wrong = "has no effect with dropout in user.lora or group.lora: states differ in every step"
            problems.append(Problem("user.cache_bytes", wrong, "Remove it, or the dropout."))
    return problems


def _batches(config: RunConfig) -> list[Problem]:
    length, problems = config.base.max_length, []
    budgets = {
        "user.num_tokens_per_batch": config.user.num_tokens_per_batch,
        "evaluation.num_tokens_per_batch": config.evaluation.num_tokens_per_batch,
    }
    for key, budget in budgets.items():
        if budget < length:
            wrong = f"{budget} cannot hold one example of base.max_length {length}"
            problems.append(Problem(key, wrong, f"Raise it to at least {length}, or lower base.max_length."))
    return problems


def _recipes(config: RunConfig) -> list[Problem]:
    """Names of methods, and what the run makes of them."""
    problems, known = [], all_methods(config)
    for name, recipe in config.recipes.items():
        key, like = f"recipes.{name}", recipe.like or name
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9+._-]{0,63}", name):
            mend = "Use letters, digits, `+`, `.`, `_` and `-`, 64 at most: folders are called so."
            problems.append(Problem(key, f"{name!r} cannot name a method", mend))
            continue
        if like not in METHODS:
            near = difflib.get_close_matches(like, METHODS, n=1)
            mend = f"Did you mean `{near[0]}`?" if near else f"Shipped methods are {', '.join(METHODS)}."
            problems.append(Problem(f"{key}.like", f"no shipped method {like!r}", mend))
            continue
        if METHODS[like].kind != "model":
            wrong = f"{like} builds no prompts, or plain ones only, so there is nothing to change"
            problems.append(Problem(key, wrong, "Make it from a method that answers prompts, such as RAG."))
            continue
        changed, wrong_values = changed_recipe(METHODS[like], recipe.prompt)
        problems += [replace(problem, key=f"{key}.prompt.{problem.key}") for problem in wrong_values]
        problems += recipe_problems(changed, f"{key}.prompt") if changed is not None else []
        if name not in config.evaluation.methods:
            mend = "Add it to evaluation.methods, or remove it."
            problems.append(Problem(key, "has no effect: the method is not evaluated", mend))
    if unknown := [name for name in config.evaluation.methods if name not in known]:
        spelt = {name.casefold(): name for name in known}
        found = {name: difflib.get_close_matches(name.casefold(), spelt, n=1) for name in unknown}
        near = [f"`{spelt[matches[0]]}` for {name!r}" for name, matches in found.items() if matches]
        mend = (f"Did you mean {', '.join(near)}? " if near else "") + f"Methods are {', '.join(known)}."
        problems.append(Problem("evaluation.methods", f"no method {', '.join(map(repr, unknown))}", mend))
    return problems


def _methods(config: RunConfig) -> list[Problem]:
    evaluation, problems = config.evaluation, []
    needs = needs_of(config)
    missing = sorted(set(config.group.lora.target_modules) - set(config.user.lora.target_modules))
    lora_aware = needs.routers or needs.joints
    if lora_aware and missing:
        wrong = f"lacks {', '.join(missing)}, which group.lora.target_modules has"
        mend = (
            "The LoRA-aware router reads the user's LoRA on every group module: add them, or drop the proper methods."
        )
        problems.append(Problem("user.lora.target_modules", wrong, mend))
    below = _missing_layers(config)
    if lora_aware and below:
        mend = "The LoRA-aware router reads the user's LoRA on every group module: add them, or set group.lora.layers."
        problems.append(Problem("user.lora.layers", f"lacks {below}, which group.lora has", mend))
    if "proper-released" in needs.presets and "history" not in config.group.train_on:
        wrong = "without `history`, but proper-released has a row for each user, and would leave most of them untrained"
        problems.append(Problem("group.train_on", wrong, "Add `history`, or drop the released methods."))
    for name in sorted(type(config.joint).model_fields) if not needs.joints else []:
        if is_changed(config.joint, name):
            mend = "Remove it, or add proper-joint to evaluation.methods."
            problems.append(Problem(f"joint.{name}", "has no effect without method proper-joint", mend))
    problems += check_floors(config)
    for name in evaluation.references or ():
        if name not in evaluation.methods:
            mend = f"Add it there, or compare with some of {', '.join(evaluation.methods)}."
            problems.append(Problem("evaluation.references", f"{name!r} is not in evaluation.methods", mend))
    if evaluation.closed_labels == "generate" and "ordinal" in evaluation.model_fields_set:
        mend = "Remove it, or use `closed_labels: score`."
        problems.append(Problem("evaluation.ordinal", "has no effect on generated answers", mend))
    return problems


def _missing_layers(config: RunConfig) -> str:
    """Layers of the groups that users have no LoRA on."""
    user, group = config.user.lora.layers, config.group.lora.layers
    if user is None:
        return ""
    if group is None:
        return "the layers that are not listed"
    return ", ".join(str(layer) for layer in sorted(set(group) - set(user)))


def _update(config: RunConfig) -> list[Problem]:
    key, problems = "user.only_changed", []
    if not config.user.only_changed:
        return []
    if not needs_of(config).adapter_sets:
        mend = "Remove it, or evaluate a method with user adapters, such as OPPU."
        problems.append(Problem(key, "has no effect: no method of evaluation.methods has user adapters", mend))
    if others := [m.name for m in methods_of(config) if m.lane or m.kind not in ("model", "floor")]:
        wrong = f"keeps shared stages of plain prompts only, not those behind {', '.join(others)}"
        problems.append(Problem(key, wrong, "Leave these methods out, or train all anew without user.only_changed."))
    if config.data.prepared is not None:
        mend = "Give `data.path`: the run prepares each night's data itself, so that users keep their places."
        problems.append(Problem(key, "cannot work on data.prepared", mend))
    return problems


def _ranks(distributed: DistributedConfig) -> list[Problem]:
    if distributed.min_ranks <= distributed.num_ranks:
        return []
    wrong = f"{distributed.min_ranks} is more than distributed.num_ranks {distributed.num_ranks}, so none would start"
    return [Problem("distributed.min_ranks", wrong, "Lower it, or raise num_ranks.")]


def _deepspeed(config: RunConfig) -> list[Problem]:
    key = "distributed.deepspeed"
    if not trained_stages(config):
        return []
    try:
        raw = read_ds_file(config.distributed.deepspeed)
    except (OSError, ValueError) as error:
        return [Problem(key, str(error), "Give the path of a DeepSpeed JSON, such as ds_configs/zero2.json.")]
    bf16 = config.base.dtype == "bfloat16" or (config.base.dtype == "auto" and _bf16_given(raw))
    found: dict[str, Problem] = {}
    if needs_of(config).starts and zero_stage(raw) == 3:
        wrong = (
            "`learned` runs users' own trainings, unlike many on each rank, through the whole base: not under ZeRO 3"
        )
        found["user.start"] = Problem("user.start", wrong, "Use a file of a lower ZeRO stage, or `user.start: fresh`.")
    for name, stage in trained_stages(config):
        _, problems = resolve_ds(raw, name, stage, config.distributed.num_ranks, bf16)
        for problem in problems:
            found.setdefault(problem.key, problem)
    return list(found.values())


def _bf16_given(raw: dict[str, object]) -> bool:
    section = raw.get("bf16")
    return isinstance(section, dict) and section.get("enabled") is True
