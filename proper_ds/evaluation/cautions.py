"""What a run's own settings and its prompts make of a comparison between its methods, in sentences for people.

`report.py` adds them to the protocol's cautions, and marks the methods that `taught_by_asked` names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from proper_ds.data.config import TUNE
from proper_ds.evaluation.methods import Method, methods_of, needs_of
from proper_ds.files import digest_of
from proper_ds.model.presets import preset_of

if TYPE_CHECKING:
    from proper_ds.config import RunConfig

MUCH = 0.05
"""The share of a lane's questions from which on a shortage of room is worth a caution."""
PromptCounts = Mapping[str, Mapping[str, int]]
"""Of one lane, by split and for history items: see `data.tokens.PROMPT_COUNTS`."""


def run_cautions(config: RunConfig, prompts: Mapping[str, PromptCounts], taught: Sequence[str]) -> list[str]:
    """Everything that sets methods of this run apart besides what they are.

    Args:
        prompts: what the tokens of each lane counted.
        taught: the methods that learned from those who are asked, see `taught_by_asked`.
    """
    found = [line for lane, counts in prompts.items() for line in _room(config, lane, counts)]
    newest = config.user.max_history_items
    if newest is not None and needs_of(config).adapter_sets:
        found.append(
            f"Users' LoRAs learn from the newest {newest} items only (user.max_history_items); all other methods read"
            " the whole history."
        )
    if taught:
        found.append(
            f"{', '.join(taught)}: weights shared by all users learned from the histories (never from the questions) of"
            " users who are asked, too; the other methods' from training users alone."
        )
    written = [method.name for method in methods_of(config) if method.recipe.profile in ("file", "model")]
    if written:
        found.append(
            f"{', '.join(written)}: profiles are written from whole histories, so that the prompt of a history item may"
            " tell its own answer in training, as no question's does."
        )
    chosen = [choice for choice in config.chosen_by if choice.split == config.evaluation.split]
    if chosen:
        keys = ", ".join(key for choice in chosen for key in choice.overrides)
        found.append(
            f"{keys}: chosen on the same users that are scored here ({config.evaluation.split}), which flatters"
            f" {', '.join(dict.fromkeys(choice.method for choice in chosen))}; choose on split {TUNE}"
            " (data.tune_share), or report others."
        )
    return found


def answer_cautions(answers: pa.Table, methods: Sequence[str]) -> list[str]:
    """Methods that gave one answer to all questions of a task, or gave the same answers: their scores tell no more
    than that answer's, or than one of them.

    Args:
        answers: columns method, user, task, id and prediction, as `questions.read_predictions` reads them.
    """
    found = []
    for task in pc.unique(answers.column("task")).to_pylist():
        own = answers.filter(pc.equal(answers.column("task"), task)).sort_by(
            [("user", "ascending"), ("id", "ascending")]
        )
        constant, alike = dict[str, list[str]](), dict[tuple[int, str], list[str]]()
        num_asked = own.num_rows // max(1, pc.count_distinct(own.column("method")).as_py())
        for method in methods if num_asked > 1 else ():
            given = own.filter(pc.equal(own.column("method"), method)).column("prediction")
            if len(distinct := pc.unique(given)) == 1:
                constant.setdefault(str(distinct[0]), []).append(method)
            elif len(given):
                alike.setdefault((len(given), digest_of(given.to_pylist())), []).append(method)
        for answer, names in constant.items():
            found.append(f"{task}: {', '.join(names)}: one answer, {answer!r}, to all {num_asked} questions.")
        for names in alike.values():
            if len(names) > 1:
                found.append(f"{task}: {', '.join(names)} gave identical answers to all {num_asked} questions.")
    return found


def prior_cautions(config: RunConfig, tasks: Collection[str], with_prior: Collection[str]) -> list[str]:
    """Which tasks methods with a label prior leave out.

    Args:
        tasks, with_prior: names of the data's tasks, and of those that have a prior.
    """
    methods = [method.name for method in methods_of(config) if method.prior]
    left_out = [task for task in tasks if task not in with_prior]
    if not methods or not left_out:
        return []
    return [f"{', '.join(methods)}: not run on {', '.join(left_out)}, whose histories hold no labels of a closed set."]


def taught_by_asked(config: RunConfig, share_in_training: float) -> list[str]:
    """The methods whose shared weights learn from the histories of users who are asked and have no training question;
    each user's own LoRA, vector or prompt does not count.

    Args:
        share_in_training: of those who are asked; where all are training users, all methods learn from them alike.
    """
    if share_in_training == 1:
        return []
    return [method.name for method in methods_of(config) if _learns_from_all(method, config)]


def _learns_from_all(method: Method, config: RunConfig) -> bool:
    if method.kind == "PLoRA":
        return "history" in config.plora.train_on
    if method.preset is None:
        return False
    by_table = preset_of(method.preset, config.group.user_vector).user_vector == "table"
    if "history" in config.group.train_on and (by_table or config.group.users == "all"):
        return True
    last = config.router if method.router else config.joint if method.joint_set else None
    return last is not None and last.users == "all" and "history" in last.train_on


def _room(config: RunConfig, lane: str, counts: PromptCounts) -> list[str]:
    """What base.max_length kept out of one lane's questions."""
    asked = counts.get(config.evaluation.split, {})
    num = asked.get("num_prompts", 0)
    if not num:
        return []
    methods = [m.name for m in methods_of(config) if m.lane == lane and m.kind != "floor"]
    whose = ", ".join(methods) if lane else f"the plain prompt ({', '.join(methods)})"
    found = []
    if asked["num_cut"] > MUCH * num:
        mean = asked["num_tokens_cut"] / num
        found.append(
            f"{whose}: {asked['num_cut'] / num:.0%} of the questions were cut to base.max_length"
            f" {config.base.max_length}, by {mean:.1f} tokens in the mean over all."
        )
    shown = {
        "num_bare": "nothing but the question",
        "num_no_items": "the profile and none of the items found",
        "num_fewer_items": "fewer items than were found",
    }
    lacking = [f"{asked[key] / num:.0%} show {what}" for key, what in shown.items() if asked[key] > MUCH * num]
    if lacking:
        found.append(f"{whose}: for want of room in base.max_length {config.base.max_length}, {', '.join(lacking)}.")
    return found
