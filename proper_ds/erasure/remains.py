"""What forgetting cannot take out: what was learned from everybody together, and the caller's own files."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from proper_ds.data.sources import find_sources
from proper_ds.data.tokens import HISTORY, QUERY
from proper_ds.errors import ProperError
from proper_ds.evaluation.methods import LaneNeeds, needs_of
from proper_ds.model.presets import preset_of
from proper_ds.run_folder import in_lane
from proper_ds.training.context import RunContext
from proper_ds.training.selection import router_users, training_users

if TYPE_CHECKING:
    from proper_ds.config import RunConfig

RETRAIN = (
    "These hold nothing of one user apart from the others, but were learned from their items too. To take that out:"
    " remove the folders base (where the run has one), tokens, population, features, embeddings, group, store,"
    " router, pplug, plora and predictions from the run, and run it again; forgotten users stay left out."
)


def learned_from(context: RunContext, users: Collection[int]) -> dict[str, Any]:
    """By shared stage, when it was made and how many of the users' items and questions it was trained on.

    Counted in the data as it is now: a stage kept from earlier data may have seen fewer.
    """
    config, folder, found = context.config, context.folder, dict[str, Any]()
    if config.base.create is not None and (done := folder.stage("base").inputs()):
        found["base"] = {"made": done["finished"], "note": "tokenizer and model were made from all prepared texts"}
    for lane in needs_of(config).lanes:
        there = replace(context, lane=lane.recipe.lane)
        if there.stage("tokens").inputs() is not None and users:
            found |= _learned_in(there, lane, users)
    return found


def _learned_in(context: RunContext, needs: LaneNeeds, users: Collection[int]) -> dict[str, Any]:
    """The same for one lane."""
    config, found = context.config, dict[str, Any]()
    tokens, split = context.tokens, config.data.train_split
    everybody = np.ones(tokens.num_users, dtype=bool)
    train = training_users(tokens, split)
    router = router_users(tokens, config.router.users, config.router.max_users, split, config.seed)
    stages = {"population": (train, config.population.train_on)}
    for preset in needs.presets:
        has_table = preset_of(preset, config.group.user_vector).user_vector == "table"
        taught = everybody if has_table or config.group.users == "all" else train
        stages[f"group/{preset}"] = (taught, config.group.train_on)
    for preset in needs.routers:
        stages[f"router/{preset}"] = (router, config.router.train_on)
    for preset in needs.joints:
        joint = router_users(tokens, config.joint.users, config.joint.max_users, split, config.seed)
        stages[f"store/{preset}-joint"] = (joint, config.joint.train_on)
    stages |= dict.fromkeys(needs.pplugs, (train, config.pplug.train_on))
    stages |= {"plora": (everybody, config.plora.train_on)} if needs.plora else {}
    for name, (mask, train_on) in stages.items():
        done = context.stage(name).inputs()
        if done is not None:
            chosen = [user for user in users if user < len(mask) and mask[user]]
            found[in_lane(name, context.lane)] = {"made": done["finished"]} | _counts(context, chosen, train_on)
    return found


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
