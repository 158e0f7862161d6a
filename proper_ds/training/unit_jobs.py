"""What the fleet's actors run for training: features of users' histories, and users' adapters. Plain classes.

Each knows how to work through one unit and commit it; `fleet/worker.py` wraps them in actors.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from proper_ds.data.tokens import HISTORY, Example
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.groups import GroupLevel
from proper_ds.model.lora import LoraLayout
from proper_ds.model.user_vectors import pooled
from proper_ds.observe.log import get_logger
from proper_ds.store.store import AdapterStore
from proper_ds.training.context import RunContext
from proper_ds.training.features import FeatureData, compute_features, write_features
from proper_ds.training.selection import num_history, router_users, users_with_queries
from proper_ds.training.slots import UserTask
from proper_ds.training.users import train_users

if TYPE_CHECKING:
    from proper_ds.config import RunConfig

Tensor = torch.Tensor


class UserRange(Protocol):
    """Consecutive users that are worked through and committed together."""

    @property
    def first(self) -> int:
        """Index of the first user."""

    @property
    def stop(self) -> int:
        """One past the index of the last user."""

    @property
    def name(self) -> str:
        """The unit's name."""

    @property
    def part(self) -> str:
        """Which part of the job it belongs to: for adapters, their set."""


def history_of(context: RunContext, user: int, newest: int | None = None) -> list[Example]:
    """A user's history as training pairs, oldest first; the newest so many where a number is given."""
    start, stop = context.tokens.range_of(user)
    examples = [e for e in context.tokens.examples_of(start, stop) if e.kind == HISTORY]
    return examples[-newest:] if newest is not None else examples


def users_to_train(context: RunContext) -> np.ndarray:
    """Mask over the users that get an adapter (`user.users`): all with history, or only those that are needed."""
    config, tokens = context.config, context.tokens
    mask = num_history(tokens) > 0
    if config.user.users == "needed":
        router = config.router
        chosen = router_users(tokens, router.users, router.max_users, config.data.train_split, config.seed)
        mask = mask & (users_with_queries(tokens, config.evaluation.split) | chosen)
    return mask


def user_vector(level: GroupLevel, features: FeatureData, user: int) -> Tensor:
    """The user vector [U] from all of a user's history; the generic one where there is none."""
    assert level.encoder is not None
    sum_F, count = features.user(user)
    device = level.encoder.generic.device
    features_RF, known_R = pooled(sum_F, count).unsqueeze(0), torch.tensor([count > 0])
    with torch.no_grad():
        vector_RU = level.encoder(features_RF.to(device), known_R.to(device))
    return vector_RU[0]


class FeaturesJob:
    """Features of the history items of each unit's users, on the population model."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._context = RunContext(config, device)
        lm = self._context.load_lm(with_population=True)
        self._model = PersonalModel(lm, {})
        self._folder = self._context.folder.stage("features").path
        self._width = 2 * lm.config.hidden_size

    def run(self, unit: UserRange) -> dict[str, Any]:
        """See Job."""
        counts, examples = [], []
        for user in range(unit.first, unit.stop):
            found = history_of(self._context, user)
            counts.append(len(found))
            examples += found
        budget = self._context.config.evaluation.num_tokens_per_batch
        items_IF = compute_features(self._model, examples, budget) if examples else torch.zeros(0, self._width)
        write_features(self._folder, unit.first, counts, items_IF)
        return {"num_users": len(counts), "num_tokens": sum(len(e.ids) for e in examples)}


class UsersJob:
    """Adapters of each unit's users: set `OPPU` on the population model, or a preset's set on its group level.

    The base is held once; only the group level changes between units of different sets.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._context = RunContext(config, device)
        lm = self._context.load_lm(with_population=True)
        lora = config.user.lora
        names = sorted({*lora.target_modules, *config.group.lora.target_modules})
        self._layout = LoraLayout.of(find_targets(lm, lora.target_modules), lora)
        self._model = PersonalModel(lm, find_targets(lm, names))
        self._levels: dict[str, GroupLevel] = {}
        self._features: FeatureData | None = None
        self._mask = users_to_train(self._context)

    def _level_of(self, adapter_set: str) -> GroupLevel | None:
        if adapter_set == "OPPU":
            return None
        if adapter_set not in self._levels:
            path = self._context.folder.stage(f"group/{adapter_set}").path / "level.safetensors"
            self._levels[adapter_set] = GroupLevel.load(path).to(self._context.device)
            if self._levels[adapter_set].encoder is not None and self._features is None:
                self._features = FeatureData(self._context.folder.stage("features").path)
        return self._levels[adapter_set]

    def _task(self, user: int, level: GroupLevel | None) -> UserTask:
        context = self._context
        vector_U = None
        if level is not None and level.encoder is not None:
            assert self._features is not None
            vector_U = user_vector(level, self._features, user)
        examples = history_of(context, user, context.config.user.max_history_items)
        return UserTask(context.keys[user], examples, vector_U, user + 1)

    def run(self, unit: UserRange) -> dict[str, Any]:
        """See Job."""
        config = self._context.config
        start_s = time.perf_counter()
        level = self._level_of(unit.part)
        by_module = level.by_module() if level is not None else None
        self._model.attach_groups(by_module, config.group.lora.lora_dropout)
        tasks = [self._task(user, level) for user in range(unit.first, unit.stop) if self._mask[user]]
        results = train_users(self._model, self._layout, tasks, config.user, config.seed)
        trained = {r.key: r.row_P for r in results if r.row_P is not None}
        failed = {r.key: r.reason for r in results if r.row_P is None}
        for key, reason in failed.items():
            get_logger().warning("user %r of %s has no adapter: %s", key, unit.name, reason)
        losses = {r.key: (r.num_items, r.losses) for r in results}
        store = AdapterStore(self._context.folder.stage(f"store/{unit.part}").path)
        num_bytes = store.put_unit(unit.name, trained, failed, losses, self._layout, config.store.dtype)
        return {
            "num_users": len(trained),
            "num_failed": len(failed),
            "num_bytes": num_bytes,
            "first_loss": _mean([r.losses[0] for r in results if r.row_P is not None]),
            "last_loss": _mean([r.losses[-1] for r in results if r.row_P is not None]),
            "seconds": time.perf_counter() - start_s,
        }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
