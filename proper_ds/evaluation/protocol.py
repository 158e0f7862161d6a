"""What a run's scores are scores of: whose questions, which base, how answers are made, and what that cannot say.

`report.py` calls `protocol_of`; the texts are for people who would compare the figures with others.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from proper_ds.data.manifest import Manifest
from proper_ds.data.oppu import HELD_OUT
from proper_ds.data.prepared import PreparedData
from proper_ds.evaluation.config import EvaluationConfig
from proper_ds.evaluation.published import OPPU_100, TIME_BASED, USER_BASED, is_published
from proper_ds.model.base_files import num_parameters

if TYPE_CHECKING:
    from proper_ds.training.context import RunContext

TEST = "test"


def protocol_of(context: RunContext) -> dict[str, Any]:
    """The `protocol` of report.json: split, kind of split, base, decoding, scoring, and `cautions` for comparisons."""
    evaluation, data = context.config.evaluation, context.config.data
    name, share = name_of(context.prepared, data.train_split, evaluation.split)
    found: dict[str, Any] = {
        "name": name,
        "share_of_users_also_in_training": share,
        "split": evaluation.split,
        "train_split": data.train_split,
        "seed": context.config.seed,
        "base": context.base_name,
        "base_parameters": num_parameters(context.base_name, context.config.base.revision),
        "base_made_in_steps": context.config.base.create.max_steps if context.config.base.create else None,
        "base_dtype": _dtype(context),
        "closed_labels": evaluation.closed_labels,
        "ordinal": evaluation.ordinal,
        "decoding": decoding(evaluation),
        "confidence": evaluation.confidence,
        "num_bootstrap_samples": evaluation.num_bootstrap_samples,
        "references": evaluation.compared_with,
    }
    return found | {"cautions": cautions(found, context.prepared.manifest)}


def name_of(prepared: PreparedData, train_split: str, split: str) -> tuple[str, float]:
    """(the protocol's name, the share of users asked in `split` who have questions in training)."""
    name, share = split_protocol(users_of(prepared, train_split), users_of(prepared, split))
    if split == TEST and prepared.manifest.num_held_out:
        name = held_out(prepared.manifest.num_held_out)
    elif split == TEST and is_oppu(prepared.manifest.sources):
        name = OPPU_100
    return name, share


def users_of(prepared: PreparedData, split: str) -> np.ndarray:
    """Mask over users: those with a question in `split`."""
    parts = []
    for shard in prepared.manifest.shards:
        splits = pq.read_table(prepared.folder / shard.file, columns=["splits"]).column("splits").combine_chunks()
        mask = np.zeros(len(splits), dtype=bool)
        inside = pc.equal(pc.list_flatten(splits), split).to_numpy(zero_copy_only=False)
        mask[pc.list_parent_indices(splits).to_numpy()[inside]] = True
        parts.append(mask)
    return np.concatenate(parts)


def _dtype(context: RunContext) -> str:
    """The type that the base ran in; a run settles `auto` when its first stage needs the base."""
    path = context.folder.root / "dtype.json"
    if path.exists():
        settled: str = json.loads(path.read_text(encoding="utf-8"))
        return settled
    return str(context.dtype).removeprefix("torch.")


def split_protocol(trained: np.ndarray, asked: np.ndarray) -> tuple[str, float]:
    """(`user-based` where nobody who is asked has questions in training, `time-based` where everybody has, else
    `mixed`; the share of those asked who have), from masks over users."""
    if not trained.any() or not asked.any():
        return "no training questions", 0.0
    share = float(trained[asked].mean())
    return USER_BASED if share == 0 else TIME_BASED if share == 1 else "mixed", share


def held_out(num_users: int) -> str:
    """The name of OPPU's protocol on other data than OPPU's."""
    return f"{num_users} most active held out"


def is_oppu(sources: list[dict[str, Any]]) -> bool:
    """Whether all data are files of OPPU's, whose test users are the 100 most active."""
    return all({file["name"] for file in source["files"]} & set(HELD_OUT) for source in sources)


def decoding(evaluation: EvaluationConfig) -> str:
    """How answers are made, in words."""
    greedy = "greedy, at most " + (
        f"{evaluation.max_new_tokens} new tokens" if evaluation.max_new_tokens else "the task's number of new tokens"
    )
    if evaluation.closed_labels == "generate":
        return greedy
    rating = "the median of its distribution" if evaluation.ordinal == "median" else "the likeliest label"
    return f"closed label sets: the likeliest label (ratings: {rating}); free text: {greedy}"


def cautions(protocol: dict[str, Any], manifest: Manifest) -> list[str]:
    """Why the figures must not be put beside published ones as if they were of one experiment."""
    found = ["Published figures are of other bases, mostly 3 to 11 billion parameters, and other code."]
    if protocol["split"] != TEST:
        found.append(f"These are scores on split {protocol['split']}, published ones are on LaMP's hidden test golds.")
    if protocol["name"] == held_out(manifest.num_held_out):
        found.append(
            f"Asked are the {manifest.num_held_out} most active users, as in OPPU's protocol, but of other data."
        )
    elif protocol["name"] not in (USER_BASED, TIME_BASED, OPPU_100):
        share = f"{protocol['share_of_users_also_in_training']:.0%}"
        found.append(
            f"The split is neither LaMP's user-based nor its time-based one: {share} of the users asked train."
        )
    limits = manifest.limits
    if "max_users_per_split" in limits:
        given = limits["max_users_per_split"]
        of = {"each split": given} if isinstance(given, int) else given
        about = " and ".join(f"of {split} only the first {num} users" for split, num in of.items())
        found.append(f"{about[0].upper()}{about[1:]} took part (data.max_users_per_split).")
    if "max_history_items" in limits:
        kept = limits["max_history_items"]
        whose = {"each history": kept} if isinstance(kept, int) else {f"histories of {s}": n for s, n in kept.items()}
        about = " and ".join(f"of {whom} only the newest {num} items" for whom, num in whose.items())
        found.append(f"{about[0].upper()}{about[1:]} were used (data.max_history_items).")
    if manifest.tune_share:
        found.append(f"{manifest.tune_share:.0%} of the training users were set apart for choices (data.tune_share).")
    if manifest.num_before_history:
        found.append(
            f"{manifest.num_before_history} questions are older than some item of the history they are asked with."
        )
    own = [name for name in manifest.tasks if not is_published(name, manifest)]
    if own:
        found.append(f"{', '.join(own)}: not LaMP's own data.")
    if protocol["closed_labels"] == "score":
        found.append("Closed label sets are answered by likelihood, so that no answer is illegal; LaMP generates.")
    if any("rouge-1" in task.metrics for task in manifest.tasks.values()):
        found.append("ROUGE is the mean over questions; LaMP's script gives the median of bootstrap means.")
    return found
