"""What forgetting cannot take out: what was learned from everybody together, and the caller's own files."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from proper_ds.data.background import BACKGROUND
from proper_ds.data.profiles import Profiles
from proper_ds.data.sources import find_sources
from proper_ds.data.tokens import HISTORY, QUERY
from proper_ds.errors import DataError, ProperError
from proper_ds.evaluation.methods import methods_of
from proper_ds.model.presets import preset_of
from proper_ds.run_folder import RunFolder, in_lane, split_lane
from proper_ds.training.anchors import merge_anchors
from proper_ds.training.context import RunContext
from proper_ds.training.selection import first_questions, num_history, router_users, training_users

if TYPE_CHECKING:
    from proper_ds.config import RunConfig

RETRAINED = (
    "base",
    "tokens",
    "population",
    "features",
    "embeddings",
    "pplug",
    "plora",
    "group",
    "start",
    "store",
    "router",
    "prior",
    "predictions",
)
"""Folders of stages that learned from everybody, or were made by those that did; profiles are of one user each."""
LEARNING = ("population", "pplug/*", "plora", "group/*", "start/*", "router/*", "store/*-joint", "prior/*")
"""Stages, within a lane, whose weights or numbers are shared by all users."""


def how_to_remove(run: RunFolder) -> str:
    """Which folders of this run must go so that nothing shared has learned from the forgotten users."""
    there = [path.name for path in sorted(run.root.iterdir()) if split_lane(path.name)[0] in RETRAINED]
    return (
        "These hold nothing of one user apart from the others, but were learned from their items too. To take that out:"
        f" remove the folders {', '.join(there)} from the run, and run it again; forgotten users stay left out."
    )


def learned_from(context: RunContext, users: Collection[int]) -> dict[str, Any]:
    """By shared stage that is there, when it was made and how many of the users' items and questions it learned from.

    Counted in the data as it is now: a stage kept from earlier data may have seen fewer.
    """
    folder, found = context.folder, dict[str, Any]()
    if done := folder.stage("base").inputs():
        whose = "training users'" if "train_split" in done["settings"] else "all prepared"  # earlier versions read all
        found["base"] = {"made": done["finished"], "note": f"tokenizer and model were made from {whose} texts"}
    for tokens in folder.in_all_lanes("tokens"):
        if tokens.inputs() is not None and users:
            found |= _learned_in(replace(context, lane=split_lane(tokens.name)[1]), users)
    return found


def _learned_in(context: RunContext, users: Collection[int]) -> dict[str, Any]:
    """The same for one lane."""
    root, lane, found = context.folder.root, context.lane, dict[str, Any]()
    names = [str(path.relative_to(root)) for stem in LEARNING for path in sorted(root.glob(in_lane(stem, lane)))]
    for name in (name for name in names if split_lane(name)[1] == lane):
        done = context.folder.stage(name).inputs()
        if done is not None:
            mask, train_on = _taught(context, name, done["settings"])
            found[name] = _about(context, done, [user for user in users if user < len(mask) and mask[user]], train_on)
    tokens = context.stage("tokens")
    if (tokens.path / BACKGROUND).exists() and (done := tokens.inputs()):
        train = training_users(context.tokens, done["settings"]["train_split"])
        chosen = [user for user in users if train[user]]
        note = f"{BACKGROUND} counts words over all training users' items; prompts of others were made with it"
        found[tokens.name] = _about(context, done, chosen, ["history"]) | {"note": note}
    return found | _merged_from(context, users)


def _taught(context: RunContext, name: str, settings: dict[str, Any]) -> tuple[np.ndarray, list[str]]:
    """(mask over the users that a stage made with these settings learned from, its `train_on`)."""
    tokens, split = context.tokens, settings["train_split"]
    kind, _, preset = split_lane(name)[0].partition("/")
    if kind == "prior":  # counts of labels, and two numbers fitted to questions
        return training_users(tokens, split), ["history", "queries"]
    train_on = list(settings["train_on"])
    everybody = np.ones(tokens.num_users, dtype=bool)
    if kind in ("router", "store"):
        return router_users(tokens, settings["users"], settings["max_users"], split, settings["seed"]), train_on
    if kind == "start":  # users' own trainings on their histories are part of it
        return (first_questions(tokens, split) >= 0) & (num_history(tokens) > 0), ["history", "queries"]
    if kind == "plora":
        return everybody, train_on
    if kind == "group":
        has_table = preset_of(preset, settings.get("user_vector", "encoder")).user_vector == "table"
        if has_table or settings.get("users") == "all":
            return everybody, train_on
    return training_users(tokens, split), train_on


def _merged_from(context: RunContext, users: Collection[int]) -> dict[str, Any]:
    """Answers of method `merged` to other people's questions, made from adapters of the users."""
    found = dict[str, Any]()
    for place in context.folder.predictions():
        done = place.inputs()
        if context.lane or done is None or "num_anchors" not in done["settings"]:
            continue
        merge = context.config.merge.model_copy(update={"num_anchors": done["settings"]["num_anchors"]})
        try:
            mask = merge_anchors(context.tokens, context.config.model_copy(update={"merge": merge}))
        except DataError:  # the data has changed since: nobody is left to merge from
            continue
        if num_users := sum(bool(mask[user]) for user in users):
            note = "answers to other users' questions were made from these users' adapters"
            found[place.name] = {"made": done["finished"], "num_users": num_users, "note": note}
    return found


def _about(context: RunContext, done: dict[str, Any], users: list[int], train_on: Collection[str]) -> dict[str, Any]:
    return {"made": done["finished"]} | _counts(context, users, train_on)


def _counts(context: RunContext, users: list[int], train_on: Collection[str]) -> dict[str, int]:
    tokens, num_items, num_questions = context.tokens, 0, 0
    for user in users:
        start, stop = tokens.range_of(user)
        kind = tokens.column("kind", start, stop)
        if "history" in train_on:
            num_items += int((kind == HISTORY).sum())
        if "queries" in train_on:
            num_questions += int(((kind == QUERY) & tokens.column("has_answer", start, stop)).sum())
    return {"num_users": len(users), "num_items": num_items, "num_questions": num_questions}


def still_in_sources(config: RunConfig, keys: Collection[str]) -> list[str]:
    """Files of the caller's in which the users still stand, one line each, or why they could not be read."""
    return [*_in_data(config, keys), *_in_profiles(config, keys)]


def _in_profiles(config: RunConfig, keys: Collection[str]) -> list[str]:
    found = []
    for file in dict.fromkeys(m.recipe.profile_file for m in methods_of(config) if m.recipe.profile_file is not None):
        try:
            profiles = Profiles.from_file(Path(file))
        except (ProperError, OSError) as error:
            found.append(f"{file}: could not be read ({error})")
            continue
        if num_users := sum(profiles.of(key, "") is not None for key in keys):
            found.append(f"{file}: profiles of {num_users} users")
    return found


def _in_data(config: RunConfig, keys: Collection[str]) -> list[str]:
    if config.data.prepared is not None:
        return [f"{config.data.prepared}: prepared data of your own, not touched; the run leaves the users out"]
    try:
        sources = find_sources(config.data)
        found = []
        for source in sources:
            golds = {split: file for file, split in source.golds}
            counts: dict[str, int] = {}
            for question in source.read_questions(lambda complaint: None):
                if question.user in keys:
                    counts[question.file] = counts.get(question.file, 0) + 1
                    if question.split in golds:
                        gold = str(golds[question.split])
                        counts[gold] = counts.get(gold, 0) + 1
            found += [f"{file}: {count} records" for file, count in counts.items()]
    except (ProperError, OSError) as error:
        return [f"{', '.join(config.data.path)}: could not be read ({error})"]
    return found
