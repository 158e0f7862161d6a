"""What a method puts on the base for answering: group experts, users' adapters, or what later methods add.

`predict_job.py` switches one on at a time and asks it for the rows of each batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import numpy as np
import torch

from proper_ds.data.tokens import Example
from proper_ds.evaluation.methods import Method
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.groups import GroupLevel
from proper_ds.model.lora import SlotBuffers
from proper_ds.model.routing import Rows
from proper_ds.store.elsewhere import open_store
from proper_ds.store.layers import LayeredAdapters
from proper_ds.store.store import AdapterStore
from proper_ds.training.context import RunContext
from proper_ds.training.features import FeatureData
from proper_ds.training.unit_jobs import user_vector

Tensor = torch.Tensor

MAX_ROWS = 64
"""Questions answered at once."""


class Personal(Protocol):
    """A method's additions.

    Attributes:
        num_experts: of the groups; 0 without.
    """

    num_experts: int

    def on(self, model: PersonalModel) -> AbstractContextManager[None]:
        """The additions are on the model while the block runs."""

    def rows(self, examples: Sequence[Example]) -> tuple[Rows, list[bool]]:
        """(what the adapted modules must know of these rows, which of them have something of their user's own)."""

    def prompt(self, ids: np.ndarray) -> np.ndarray:
        """The prompt with what stands before it."""


class Adapters:
    """Nothing, groups, users' adapters, or both.

    A user without an adapter (no history, or failed) gets a slot of zeros: the groups or the population answer.
    """

    def __init__(self, method: Method, context: RunContext, num_history_U: np.ndarray) -> None:
        self._context, self._history = context, num_history_U
        self._level: GroupLevel | None = None
        self._features: FeatureData | None = None
        if method.preset is not None:
            path = context.stage(method.level_stage).path / "level.safetensors"
            self._level = GroupLevel.load(path).to(context.device)
            if self._level.encoder is not None:
                self._features = FeatureData(context.stage("features").path)
        self._store = _adapters_of(method, context)
        self._slots: SlotBuffers | None = None
        if self._store is not None and self._store.users():
            self._slots = SlotBuffers(self._store.layout, MAX_ROWS, torch.float32, context.device, trainable=False)
        self.num_experts = self._level.num_experts if self._level is not None else 0

    @contextmanager
    def on(self, model: PersonalModel) -> Iterator[None]:
        """See Personal."""
        level, slots = self._level, self._slots
        assert level is None or not level.lora_aware or slots is not None, "a router was trained without any adapter"
        model.attach_groups(level.by_module() if level is not None else None)
        model.attach_users(slots.modules() if slots is not None else None)
        try:
            yield
        finally:
            model.attach_groups(None)
            model.attach_users(None)

    def rows(self, examples: Sequence[Example]) -> tuple[Rows, list[bool]]:
        """See Personal."""
        users, rows = [example.user for example in examples], Rows()
        if self._level is not None:
            level, features = self._level, self._features
            vectors = {u: user_vector(level, features, u, int(self._history[u])) for u in set(users)}
            rows.user_RU = torch.stack([vectors[user] for user in users])
        if self._slots is None or self._store is None:
            return rows, [False] * len(users)
        keys, device = self._context.keys, self._context.device
        held = [user for user in sorted(set(users)) if self._store.has(keys[user])]
        self._slots.weights_SP.zero_()
        if held:
            self._slots.weights_SP[: len(held)] = self._store.get_many([keys[user] for user in held]).to(device)
        place = {user: n for n, user in enumerate(held)}
        # one slot more than distinct users with an adapter is never needed: rows without one share it
        rows.slot_R = torch.tensor([place.get(user, len(held) % MAX_ROWS) for user in users], device=device)
        return rows, [user in place for user in users]

    def prompt(self, ids: np.ndarray) -> np.ndarray:
        """See Personal."""
        return ids


def _adapters_of(method: Method, context: RunContext) -> AdapterStore | LayeredAdapters | None:
    if method.own_set is None:
        return None
    lower = open_store(context.stage(f"store/{method.adapter_set}").path)
    if method.joint_set is None:
        return lower
    return LayeredAdapters(open_store(context.stage(f"store/{method.joint_set}").path), lower)


def personal(method: Method, context: RunContext, num_history_U: np.ndarray) -> Personal:
    """What a method puts on the base.

    Args:
        num_history_U: history items of each user.
    """
    return Adapters(method, context, num_history_U)
