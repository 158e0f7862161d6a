"""What the fleet's actors run for training: features of users' histories, and users' adapters. Plain classes.

Each knows how to work through one unit and commit it; `fleet/worker.py` wraps them in actors.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from proper_ds.data.forgotten import Forgotten
from proper_ds.data.tokens import HISTORY, Example
from proper_ds.errors import StoreError
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import check_masks, find_targets
from proper_ds.model.groups import GroupLevel
from proper_ds.model.lora import LoraLayout
from proper_ds.model.user_start import START, UserStart
from proper_ds.model.user_vectors import pooled
from proper_ds.observe.log import get_logger
from proper_ds.run_folder import split_lane
from proper_ds.store.elsewhere import check_in_place, open_store
from proper_ds.store.store import AdapterStore
from proper_ds.training.config import UserConfig
from proper_ds.training.context import RunContext
from proper_ds.training.features import FeatureData, compute_features, previous_features, write_features
from proper_ds.training.lanes import Lanes
from proper_ds.training.selection import num_history, table_line
from proper_ds.training.set_plan import Role, SetPlan, users_of_role
from proper_ds.training.slots import UserTask
from proper_ds.training.users import Counters, UserResult, train_users

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
        """The full name of the stage that it belongs to."""


def history_of(context: RunContext, user: int, newest: int | None = None) -> list[Example]:
    """A user's history as training pairs, oldest first; the newest so many where a number is given."""
    start, stop = context.tokens.range_of(user)
    examples = [e for e in context.tokens.examples_of(start, stop) if e.kind == HISTORY]
    return examples[-newest:] if newest is not None else examples


def user_vector(
    level: GroupLevel,
    features: FeatureData | None,
    user: int,
    num_items: int,
    positions: Sequence[int] | None = None,
) -> Tensor:
    """The user vector [U] from a user's history, or from the user table; the generic one where there is none.

    Args:
        num_items: of the whole history.
        positions: the items to be used; by default all of them. A user table knows no items.
    """
    device = level.device
    if level.user_table is not None:
        line = table_line(user, num_items, level.sizes.num_users)
        return level.user_table.weight[line].detach().to(device)
    assert level.encoder is not None and features is not None, "encoder presets have features"
    if positions is None:
        sum_F, count = features.user(user)
    else:
        sum_F, count = features.items(user)[list(positions)].sum(0), len(positions)
    features_RF, known_R = pooled(sum_F, count).unsqueeze(0), torch.tensor([count > 0])
    with torch.no_grad():
        vector_RU = level.encoder(features_RF.to(device), known_R.to(device))
    return vector_RU[0]


class FeaturesJob:
    """Features of the history items of each unit's users, on the population model of the unit's lane.

    In an update, those of users whose history did not change are taken from the night before.
    """

    def __init__(self, config: RunConfig, device: torch.device, lanes: list[str]) -> None:
        self._lanes = Lanes(config, device, lanes)
        self._model = PersonalModel(self._lanes.lm, {})
        self._width = 2 * self._lanes.lm.config.hidden_size
        self._before: dict[str, FeatureData | None] = {}

    def run(self, unit: UserRange) -> dict[str, Any]:
        """See Job."""
        start_s, context = time.perf_counter(), self._lanes.enter(unit.part)
        if unit.part not in self._before:
            self._before[unit.part] = previous_features(context.folder, unit.part)
        before = self._before[unit.part]
        digests = context.tokens.history_digests(unit.first, unit.stop)
        histories = [history_of(context, user) for user in range(unit.first, unit.stop)]
        parts: dict[int, Tensor] = {}
        if before is not None:
            for n, digest in enumerate(digests):
                found_IF = before.items_of_history(unit.first + n, digest)
                if found_IF is not None:
                    parts[n] = found_IF
        num_taken = len(parts)
        missing = [n for n in range(len(histories)) if n not in parts]
        examples = [example for n in missing for example in histories[n]]
        budget = context.config.evaluation.num_tokens_per_batch
        made_IF = compute_features(self._model, examples, budget) if examples else torch.zeros(0, self._width)
        parts |= dict(zip(missing, made_IF.split([len(histories[n]) for n in missing]), strict=True))
        counts = [len(history) for history in histories]
        items_IF = torch.cat([parts[n] for n in range(len(counts))])
        write_features(context.stage("features").path, unit.first, counts, items_IF, digests)
        return {
            "num_users": len(counts),
            "num_taken": num_taken,
            "num_tokens": sum(len(e.ids) for e in examples),
            "seconds": time.perf_counter() - start_s,
        }


@dataclass(frozen=True)
class _Set:
    """One set of adapters as a job sees it, opened once.

    Attributes:
        store: where units are put.
        before: the same store as it was when the job first looked: with `store` the catalog would be read anew after
            each unit.
    """

    plan: SetPlan
    store: AdapterStore
    before: AdapterStore


class UsersJob:
    """Adapters of each unit's users: set `OPPU` on the population model, or a preset's set on its group level.

    The base is held once; between units of different sets the group level changes, and the lane's population LoRA.
    """

    def __init__(self, config: RunConfig, device: torch.device, stores: dict[str, str]) -> None:
        """`stores` are locations by stage, as the driver has them: one left over must not find those of a later run."""
        self._config = config
        self._lanes = Lanes(config, device, list(dict.fromkeys(split_lane(name)[1] for name in stores)))
        lm, lora = self._lanes.lm, config.user.lora
        if config.user.share_prefix:
            check_masks(lm, "user.share_prefix")
        names = sorted({*lora.target_modules, *config.group.lora.target_modules})
        self._layout = LoraLayout.of(find_targets(lm, lora.target_modules, lora.layers), lora)
        self._model = PersonalModel(lm, find_targets(lm, names))
        self._levels: dict[str, GroupLevel] = {}
        self._features: dict[str, FeatureData] = {}
        self._learned: dict[str, UserStart] = {}
        self._locations, self._sets = stores, dict[str, _Set]()
        self._by_role: dict[str, dict[Role, np.ndarray]] = {}

    def _set_of(self, name: str) -> _Set:
        if name not in self._sets:
            plan = SetPlan.read(self._lanes.folder.stage(name))
            location = self._locations[name]
            self._sets[name] = _Set(plan, open_store(location), open_store(location))
        return self._sets[name]

    def _level_of(self, context: RunContext, name: str) -> GroupLevel | None:
        adapter_set = _set_name(name)
        if adapter_set == "OPPU":
            return None
        if name not in self._levels:
            path = context.stage(f"group/{adapter_set}").path / "level.safetensors"
            self._levels[name] = GroupLevel.load(path).to(context.device)
            if self._levels[name].encoder is not None and context.lane not in self._features:
                self._features[context.lane] = FeatureData(context.stage("features").path)
        return self._levels[name]

    def _task(self, context: RunContext, user: int, level: GroupLevel | None, start_P: Tensor | None) -> UserTask:
        examples = history_of(context, user, context.config.user.max_history_items)
        features = self._features.get(context.lane)
        vector_U = user_vector(level, features, user, len(examples)) if level is not None else None
        return UserTask(context.keys[user], examples, vector_U, start_P)

    def _learned_start(self, context: RunContext, name: str) -> UserStart | None:
        adapter_set = _set_name(name)
        if not self._config.starts_learned(adapter_set):
            return None
        if name not in self._learned:
            self._learned[name] = load_start(context, adapter_set)
        return self._learned[name]

    def _starts(self, name: str, keys: list[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """In an update: (adapters [P] to start from, by user; why those of others cannot be read).

        With a learned start everybody goes from there: it knows how far a whole history leads, not some items more.
        """
        store = self._sets[name].before
        is_update = self._sets[name].plan.version > 1 and not self._config.starts_learned(_set_name(name))
        held = [key for key in keys if store.has(key)] if is_update else []
        if not held:
            return {}, {}
        if store.layout != self._layout:
            raise StoreError(
                f"{name} holds adapters of another layout than user.lora asks for, which user.only_changed"
                " cannot start from; put user.lora back, or train all anew without user.only_changed"
            )
        try:
            return dict(zip(held, store.get_many(held), strict=True)), {}
        except StoreError:  # one of them at least: look at each
            check_in_place(store)
        starts, damaged = dict[str, Tensor](), dict[str, str]()
        for key in held:
            try:
                starts[key] = store.get(key)
            except StoreError as error:
                damaged[key] = f"the adapter to start from cannot be read: {error}"
        return starts, damaged

    def run(self, unit: UserRange) -> dict[str, Any]:
        """See Job."""
        config, start_s = self._config, time.perf_counter()
        held = self._set_of(unit.part)
        if held.store.has_unit(unit.name, held.plan.version):
            # a retry after a commit must not start from what that commit stored
            return {"num_users": 0, "num_failed": 0, "num_bytes": 0, "seconds": 0.0}
        context = self._lanes.enter(unit.part)
        level = self._level_of(context, unit.part)
        by_module = level.by_module() if level is not None else None
        self._model.attach_groups(by_module, config.group.lora.lora_dropout)
        # somebody chosen may have been forgotten since
        has_history = num_history(context.tokens) > 0
        users = [user for user in range(unit.first, unit.stop) if held.plan.chosen[user] and has_history[user]]
        starts, damaged = self._starts(unit.part, [context.keys[user] for user in users])
        users = [user for user in users if context.keys[user] not in damaged]
        tasks = [self._task(context, user, level, starts.get(context.keys[user])) for user in users]
        counters = Counters()
        start = self._learned_start(context, unit.part)
        settings = config.user_for(_set_name(unit.part))
        results = train_users(self._model, self._layout, tasks, settings, config.seed, counters, start)
        work = [_work(task, result, settings) for task, result in zip(tasks, results, strict=True)]
        shares = self._shares(unit.part, context, users, work)
        digests = dict(zip((task.key for task in tasks), _digests(context, users), strict=True))
        # without digests: the next update tries these users again
        results += [UserResult(key, None, reason) for key, reason in damaged.items()]
        results, num_bytes = self._commit(unit, results, digests)
        trained = [result for result in results if result.row_P is not None]
        return {
            "num_users": len(trained),
            "num_failed": len(results) - len(trained),
            "num_warm": len(starts),
            "num_bytes": num_bytes,
            "num_tokens": counters.whole.num_tokens,
            "shares": shares,
            "first_loss": _mean([result.losses[0] for result in trained]),
            "last_loss": _mean([result.losses[-1] for result in trained]),
            "seconds": time.perf_counter() - start_s,
        }

    def _shares(self, name: str, context: RunContext, users: list[int], work: list[float]) -> dict[str, float]:
        """How much of a unit's work each role's users took (`set_plan.Role`); empty where everybody is trained."""
        if name not in self._by_role:
            roles = sorted(self._sets[name].plan.roles)
            self._by_role[name] = {role: users_of_role(context, role) for role in roles}
        total = max(1.0, sum(work))  # 0 where nobody was trained
        return {
            role: sum(w for user, w in zip(users, work, strict=True) if mask[user]) / total
            for role, mask in self._by_role[name].items()
        }

    def _commit(
        self, unit: UserRange, results: list[UserResult], digests: dict[str, str]
    ) -> tuple[list[UserResult], int]:
        """Put the unit without users who were forgotten meanwhile; (the results that are left, bytes of the pack)."""
        held = self._sets[unit.part]
        check_in_place(held.store)
        forgotten = Forgotten.read(self._lanes.folder.root)  # forgetting begins with this list
        kept = [result for result in results if not forgotten.has(result.key)]
        if len(kept) < len(results):
            get_logger().warning("%s: %d users were forgotten meanwhile", unit.name, len(results) - len(kept))
        failed = {result.key: result.reason for result in kept if result.row_P is None}
        for key, reason in failed.items():
            has_one = held.plan.version > 1 and held.before.has(key)
            what = "keeps the adapter it had" if has_one else "has no adapter"
            get_logger().warning("user %r of %s %s: %s", key, unit.name, what, reason)
        num_bytes = held.store.put_unit(
            unit.name,
            {result.key: result.row_P for result in kept if result.row_P is not None},
            failed,
            {result.key: (result.num_items, result.losses) for result in kept},
            self._layout,
            self._config.store.dtype,
            version=held.plan.version,
            digests=digests,
        )
        return kept, num_bytes


def load_start(context: RunContext, adapter_set: str) -> UserStart:
    """The learned start of a set in the context's lane."""
    return UserStart.load(context.stage(f"start/{adapter_set}").path / START)


def _work(task: UserTask, result: UserResult, settings: UserConfig) -> float:
    """Tokens of a user's items times the epochs that were made."""
    steps_per_epoch = math.ceil(len(task.examples) / settings.per_device_train_batch_size)
    return sum(len(example.ids) for example in task.examples) * len(result.losses) / max(1, steps_per_epoch)


def _set_name(store: str) -> str:
    """The set, without its lane, of a stage."""
    return split_lane(store)[0].removeprefix("store/")


def _digests(context: RunContext, users: list[int]) -> list[str]:
    found = context.tokens.history_digests(users[0], users[-1] + 1) if users else []
    return [found[user - users[0]] for user in users]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
