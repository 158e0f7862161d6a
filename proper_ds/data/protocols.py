"""OPPU's protocol for any prepared data: the most active users are held out, everybody else teaches the base.

Called by `proper-ds data oppu-split`. What a user knows and is asked does not change, only which split the questions
are in; questions without an answer are left out, as nobody can be scored by them.
"""

from __future__ import annotations

import heapq
from dataclasses import replace
from pathlib import Path

from proper_ds.data.manifest import MANIFEST, Counts, Manifest
from proper_ds.data.prepared import PreparedData
from proper_ds.data.shards import ShardWriter
from proper_ds.errors import DataError

HELD_OUT, TAUGHT = "test", "train"


def hold_out_most_active(prepared: PreparedData, out: Path, num_held_out: int) -> tuple[Manifest, int]:
    """Write `prepared` anew into `out`, and return its manifest and the shortest history of a held-out user.

    Held out are the `num_held_out` users with the longest histories among those with a question that has an answer;
    of equally long ones, those that come first.

    Raises:
        DataError: where `out` holds prepared data, where histories are ahead of questions, or where not even one more
            user than asked for has such questions.
    """
    if (out / MANIFEST).exists():
        raise DataError(f"{out} holds prepared data already; give another folder")
    if prepared.manifest.num_users_ahead:
        about = ", ".join(f"{num} users of {split}" for split, num in prepared.manifest.num_users_ahead.items())
        raise DataError(
            f"{prepared.folder}: {about} have history from later splits, which are ahead of their questions; prepare"
            " the data again without the later splits (data.splits, --split)"
        )
    active = (
        (len(user.history), -index)
        for index, user in enumerate(prepared.users())
        if any(query.answer is not None for query in user.queries)
    )
    longest = heapq.nlargest(num_held_out + 1, active)
    if len(longest) <= num_held_out:
        raise DataError(
            f"{prepared.folder} has {len(longest)} users with answered questions: too few to hold {num_held_out} out"
            " and to teach others; hold out fewer"
        )
    chosen = {-index for _, index in longest[:num_held_out]}
    counts = Counts()
    num_per_shard = max(shard.num_users for shard in prepared.manifest.shards)
    with ShardWriter(out, num_per_shard) as writer:
        for index, user in enumerate(prepared.users()):
            split = HELD_OUT if index in chosen else TAUGHT
            user.queries = [replace(query, split=split) for query in user.queries if query.answer is not None]
            writer.write(user)
            counts.add(user)
    manifest = replace(
        prepared.manifest,
        shards=writer.shards,
        num_cold_users=counts.num_cold,
        num_empty=counts.num_empty,
        splits=counts.splits(),
        tune_share=0,
        num_taught_as_history=0,
        num_held_out=num_held_out,
    )
    manifest.write(out)
    return manifest, longest[num_held_out - 1][0]
