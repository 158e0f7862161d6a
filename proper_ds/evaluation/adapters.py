"""What LoRA methods put on the base for answering: group experts, users' adapters, both or nothing.

`predict_job.py` asks here for each method's addition; those of other methods are in `additions.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from proper_ds.data.tokens import Example
from proper_ds.evaluation.additions import MAX_ROWS, Addition, MergedAnswers, PloraAnswers, PplugAnswers
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
from proper_ds.training.selection import num_history
from proper_ds.training.unit_jobs import load_start, user_vector

Tensor = torch.Tensor


class AdapterAnswers:
    """Nothing, groups, users' adapters, or both.

    A user without an adapter (no history, or failed) gets a slot of zeros: the groups or the population answer; or the
    learned start, where the set's users began there.
    """

    def __init__(self, method: Method, context: RunContext) -> None:
        self._context, self._history = context, num_history(context.tokens)
        self._level: GroupLevel | None = None
        self._features: FeatureData | None = None
        if method.preset is not None:
            path = context.stage(method.level_stage).path / "level.safetensors"
            self._level = GroupLevel.load(path).to(context.device)
            if self._level.encoder is not None:
                self._features = FeatureData(context.stage("features").path)
        self._store = _adapters_of(method, context)
        self._slots: SlotBuffers | None = None
        self._without_P: Tensor | float = 0.0
        layout = self._store.layout if self._store is not None and self._store.users() else None
        if method.adapter_set in context.config.learned_sets:
            start = load_start(context, str(method.adapter_set))
            layout, self._without_P = start.layout, start.row_P.to(context.device)
        if layout is not None:
            self._slots = SlotBuffers(layout, MAX_ROWS, torch.float32, context.device, trainable=False)
        self.num_experts = self._level.num_experts if self._level is not None else 0

    def attach(self, model: PersonalModel) -> None:
        """See Addition."""
        level, slots = self._level, self._slots
        assert level is None or not level.lora_aware or slots is not None, "a router was trained without any adapter"
        model.attach_groups(level.by_module() if level is not None else None)
        model.attach_users(slots.modules() if slots is not None else None)

    def detach(self, model: PersonalModel) -> None:
        """See Addition."""
        model.attach_groups(None)
        model.attach_users(None)

    def rows(self, examples: Sequence[Example]) -> tuple[Rows, list[bool]]:
        """See Addition."""
        users, rows = [example.user for example in examples], Rows()
        if self._level is not None:
            level, features = self._level, self._features
            vectors = {u: user_vector(level, features, u, int(self._history[u])) for u in set(users)}
            rows.user_RU = torch.stack([vectors[user] for user in users])
        if self._slots is None or self._store is None:
            return rows, [False] * len(users)
        keys, device = self._context.keys, self._context.device
        held = [user for user in sorted(set(users)) if self._store.has(keys[user])]
        self._slots.weights_SP[:] = self._without_P
        if held:
            self._slots.weights_SP[: len(held)] = self._store.get_many([keys[user] for user in held]).to(device)
        place = {user: n for n, user in enumerate(held)}
        # one slot more than distinct users with an adapter is never needed: rows without one share it
        rows.slot_R = torch.tensor([place.get(user, len(held) % MAX_ROWS) for user in users], device=device)
        return rows, [user in place for user in users]

    def prompt(self, ids_T: np.ndarray) -> np.ndarray:
        """See Addition."""
        return ids_T


def _adapters_of(method: Method, context: RunContext) -> AdapterStore | LayeredAdapters | None:
    if method.own_set is None:
        return None
    lower = open_store(context.stage(f"store/{method.adapter_set}").path)
    if method.joint_set is None:
        return lower
    return LayeredAdapters(open_store(context.stage(f"store/{method.joint_set}").path), lower)


def addition_of(method: Method, context: RunContext) -> Addition:
    """What a method puts on the base, or on the base with the population LoRA merged."""
    if method.kind == "PPlug":
        return PplugAnswers(context, method.population)
    if method.kind == "PLoRA":
        return PloraAnswers(context)
    if method.kind == "merged":
        return MergedAnswers(context)
    return AdapterAnswers(method, context)
