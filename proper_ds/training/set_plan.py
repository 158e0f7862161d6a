"""Whom a set of adapters trains, and as which version: decided once by the driver, read by every actor.

A resumed run must train the same users in the same units, whatever is committed by then; so the choice is written down.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from proper_ds.files import atomic_path
from proper_ds.observe.log import get_logger
from proper_ds.run_folder import StageFolder
from proper_ds.store.elsewhere import open_store
from proper_ds.training.anchors import merge_anchors
from proper_ds.training.context import RunContext
from proper_ds.training.selection import num_history, router_users, users_with_queries

USERS_PER_BLOCK = 10_000


@dataclass(frozen=True)
class SetPlan:
    """One version of one set of adapters.

    Attributes:
        version: 1 for the first training; users that are not chosen keep the version they have.
        chosen: mask over the users.
    """

    version: int
    chosen: np.ndarray

    @classmethod
    def read(cls, place: StageFolder) -> SetPlan:
        """The plan of the version that was begun last."""
        begun = place.begun()
        assert begun is not None, f"{place.path} was not begun"
        version = int(begun["version"])
        return cls(version, np.load(place.path / _file(version), allow_pickle=False))


@dataclass(frozen=True)
class AlsoNeeded:
    """Who gets an adapter under `user.users: needed` besides the users who are evaluated.

    Attributes:
        by_router: the users that a LoRA-aware router of this set learns from.
        by_merging: the users that method `merged` merges from.
    """

    by_router: bool
    by_merging: bool


def _file(version: int) -> str:
    return f"chosen-{version:06d}.npy"


def ensure_plan(context: RunContext, place: StageFolder, also: AlsoNeeded) -> SetPlan:
    """The plan of the version that was begun last; made where it is missing, before anything is trained."""
    begun = place.begun()
    assert begun is not None, f"{place.path} was not begun"
    version = int(begun["version"])
    path = place.path / _file(version)
    if not path.exists():
        chosen = users_to_train(context, also) if version == 1 else _changed(context, place, also)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, chosen, allow_pickle=False)
    return SetPlan.read(place)


def users_to_train(context: RunContext, also: AlsoNeeded) -> np.ndarray:
    """Mask over the users that get an adapter (`user.users`): all with history, or only those that are needed."""
    config, tokens = context.config, context.tokens
    mask = num_history(tokens) > 0
    if config.user.users == "needed":
        chosen = users_with_queries(tokens, config.evaluation.split)
        if also.by_router:
            router = config.router
            chosen |= router_users(tokens, router.users, router.max_users, config.data.train_split, config.seed)
        if also.by_merging:
            chosen |= merge_anchors(tokens, config)
        mask = mask & chosen
    return mask


def _changed(context: RunContext, place: StageFolder, also: AlsoNeeded) -> np.ndarray:
    """Mask over the users to train whose history is not the one that their newest version was learned from."""
    tokens, keys, store = context.tokens, context.keys, open_store(place.path)
    mask = users_to_train(context, also)
    num_kept = num_new = 0
    for start in range(0, tokens.num_users, USERS_PER_BLOCK):
        stop = min(start + USERS_PER_BLOCK, tokens.num_users)
        for user, digest in enumerate(tokens.history_digests(start, stop), start=start):
            if not mask[user]:
                continue
            entry = store.entry(keys[user])
            if entry is None:
                num_new += 1
            # after a rollback the current version is not the newest
            elif digest in (entry.digest, max(store.history(keys[user]), key=lambda e: e.version).digest):
                mask[user] = False
                num_kept += 1
    num_changed = int(mask.sum()) - num_new
    get_logger().info(
        "%s: %d users with a changed history and %d new ones are trained, %d keep their version",
        place.name,
        num_changed,
        num_new,
        num_kept,
    )
    return mask
