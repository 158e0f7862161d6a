"""Whom a set of adapters trains, and as which version: decided once by the driver, read by every actor.

A resumed run must train the same users in the same units, whatever is committed by then; so the choice is written down.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from proper_ds.files import atomic_path
from proper_ds.observe.log import get_logger
from proper_ds.run_folder import StageFolder
from proper_ds.store.elsewhere import open_store
from proper_ds.training.anchors import merge_anchors
from proper_ds.training.context import RunContext
from proper_ds.training.selection import num_history, router_users, users_with_queries

USERS_PER_BLOCK = 10_000
SPLITS, ASKED, ROUTER_USERS, NUM_ANCHORS = OF_NEEDED = ("splits", "asked", "router_users", "num_anchors")
"""Settings of a set of adapters that say who is needed, where `user.users` is `needed`."""

Role = Literal["asked", "router", "merged"]
"""What users' adapters are needed for: `asked`, to answer those who are evaluated; `router`, for that, and for a
LoRA-aware router to learn from; `merged`, for method `merged` to merge from."""


def roles_in(settings: Mapping[str, Any]) -> frozenset[Role]:
    """What the adapters of a set are needed for, from its settings; none where everybody gets one."""
    if SPLITS not in settings:
        return frozenset()
    told: dict[Role, bool] = {
        "asked": settings.get(ASKED, True),
        "router": ROUTER_USERS in settings,
        "merged": NUM_ANCHORS in settings,
    }
    return frozenset(role for role, is_needed in told.items() if is_needed)


def users_of_role(context: RunContext, role: Role) -> np.ndarray:
    """Mask over the users whose adapters a role needs, with history or without."""
    config, tokens = context.config, context.tokens
    if role == "merged":
        return merge_anchors(tokens, config)
    found = users_with_queries(tokens, config.evaluation.split)
    if role == "router":
        router = config.router
        found |= router_users(tokens, router.users, router.max_users, config.data.train_split, config.seed)
    return found


@dataclass(frozen=True)
class SetPlan:
    """One version of one set of adapters.

    Attributes:
        version: 1 for the first training; users that are not chosen keep the version they have.
        chosen: mask over the users.
        roles: what they are needed for; none where everybody is trained.
    """

    version: int
    chosen: np.ndarray
    roles: frozenset[Role] = frozenset()

    @classmethod
    def read(cls, place: StageFolder) -> SetPlan:
        """The plan of the version that was begun last."""
        begun = place.begun()
        assert begun is not None, f"{place.path} was not begun"
        version = int(begun["version"])
        chosen = np.load(place.path / _file(version), allow_pickle=False)
        return cls(version, chosen, roles_in(begun.get("settings", {})))


def _file(version: int) -> str:
    return f"chosen-{version:06d}.npy"


def ensure_plan(context: RunContext, place: StageFolder, roles: Collection[Role]) -> SetPlan:
    """The plan of the version that was begun last; made where it is missing, before anything is trained."""
    begun = place.begun()
    assert begun is not None, f"{place.path} was not begun"
    version = int(begun["version"])
    path = place.path / _file(version)
    if not path.exists():
        chosen = users_to_train(context, roles) if version == 1 else _changed(context, place, roles)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, chosen, allow_pickle=False)
    return SetPlan.read(place)


def users_to_train(context: RunContext, roles: Collection[Role]) -> np.ndarray:
    """Mask over the users that get an adapter (`user.users`): all with history, or only those that are needed."""
    mask = num_history(context.tokens) > 0
    if context.config.user.users == "all":
        return mask
    needed = np.zeros_like(mask)
    for role in roles:
        needed |= users_of_role(context, role)
    return mask & needed


def _changed(context: RunContext, place: StageFolder, roles: Collection[Role]) -> np.ndarray:
    """Mask over the users to train whose history is not the one that their newest version was learned from."""
    tokens, keys, store = context.tokens, context.keys, open_store(place.path)
    mask = users_to_train(context, roles)
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
