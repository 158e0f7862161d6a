"""Stages 3.1 and 3.2 together: the LoRA-aware router and users' adapters, trained on from 3.1's (methods.md 7, row 10).

The router trains in the engine, shared by all ranks; each user's adapter on the one rank that holds it, where all of
the user's examples go. The set `store/<preset>-joint` gets the adapters of the sampled users; others keep 3.1's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from proper_ds.data.forgotten import Forgotten
from proper_ds.distributed.apart import AdamSettings, Apart
from proper_ds.distributed.checkpoint import Checkpoint
from proper_ds.distributed.engine import RankEngine
from proper_ds.distributed.ranks import Ranks
from proper_ds.model.lora import LoraLayout
from proper_ds.observe.metrics import MetricsFile
from proper_ds.store.elsewhere import open_store, start_over
from proper_ds.training.config import JointConfig
from proper_ds.training.context import RunContext
from proper_ds.training.rank_batch import RankBatch
from proper_ds.training.router import RouterStage
from proper_ds.training.user_rows import NAME, UserRows, users_per_rank

Tensor = torch.Tensor

USERS_PER_UNIT = 64


class JointStage(RouterStage):
    """See the module's docstring."""

    section = "joint"

    def __init__(self, context: RunContext, preset: str, ranks: Ranks) -> None:
        """A collective of all ranks."""
        super().__init__(context, preset, ranks)
        self._sampled = np.flatnonzero(self._users)
        self.num_owners = ranks.num_ranks
        self._rows: UserRows | None = None

    @staticmethod
    def _name_of(preset: str) -> str:
        return f"store/{preset}-joint"

    @property
    def settings(self) -> JointConfig:
        """See RankStage."""
        return self.context.config.joint

    def owner_of(self, indices: np.ndarray) -> np.ndarray:
        """See RankStage: the rank that holds the example's user."""
        places = np.searchsorted(self._sampled, self.context.tokens.users_of(indices))
        return places // users_per_rank(len(self._sampled), self.num_owners)

    def apart(self, ds_config: dict[str, Any]) -> list[Apart]:
        """See RankStage."""
        settings = self.settings
        self._rows = UserRows(
            self._model,
            self._adapters.layout,
            self._sampled,
            self._adapters.rows,
            self._ranks,
            AdamSettings.of(ds_config),
            max_grad_norm=settings.max_grad_norm,
            rate_ratio=settings.user_learning_rate / settings.learning_rate,
            dropout=self.context.config.user.lora.lora_dropout,
        )
        return [self._rows]

    def before_start(self, engine: RankEngine, metrics: MetricsFile) -> None:
        """See RouterStage: every rank probes whatever users' examples it is given.

        Units that a training without a checkpoint left were of other weights, perhaps of other users: they are dropped.
        """
        if self._ranks.is_first:
            start_over(self.context.stage(self.name).path)
        self._ranks.barrier()
        rows, self._rows = self._rows, None
        self._model.attach_users(self._slots.modules())
        super().before_start(engine, metrics)
        assert rows is not None, "the rows are made with the engine"
        self._rows = rows
        rows.attach()

    def _seat(self, made: RankBatch) -> list[int]:
        if self._rows is None:
            return super()._seat(made)
        return self._rows.seat(made.examples, made.num_targets, counts=bool(made.weight))

    def before_finish(self, checkpoint: Checkpoint) -> None:
        """Put the adapters into the store; a unit is the same users whatever the number of ranks, and put once."""
        context, version = self.context, 1
        store = open_store(context.stage(self.name).path)
        layout, dtype = self._adapters.layout, context.config.store.dtype
        for number, users in list(self._units())[self._ranks.rank :: self._ranks.num_ranks]:
            unit, start = f"joint-{number:06d}", number * USERS_PER_UNIT
            if store.has_unit(unit, version):
                continue
            rows_NP = checkpoint.rows(NAME, start, start + len(users))
            num_steps_N = checkpoint.rows(f"num_steps/{NAME}", start, start + len(users)).tolist()
            forgotten = Forgotten.read(context.folder.root)
            adapters, failures, digests = dict[str, Tensor](), dict[str, str](), dict[str, str]()
            for user, key, row_P, num_steps in zip(users, self._keys(users), rows_NP, num_steps_N, strict=True):
                if not num_steps or forgotten.has(key):
                    continue  # who was in no step keeps the adapter of 3.1
                digests[key] = context.tokens.history_digests(user, user + 1)[0]
                reason = _why_useless(row_P, layout)
                if reason:
                    failures[key] = f"{reason} after training jointly with the router"
                else:
                    adapters[key] = row_P
            losses = dict.fromkeys([*adapters, *failures], (0, list[float]()))
            store.put_unit(unit, adapters, failures, losses, layout, dtype, version=version, digests=digests)

    def _units(self) -> Iterator[tuple[int, list[int]]]:
        for number in range(-(-len(self._sampled) // USERS_PER_UNIT)):
            yield number, self._sampled[number * USERS_PER_UNIT : (number + 1) * USERS_PER_UNIT].tolist()

    def _keys(self, users: list[int]) -> list[str]:
        found: list[str] = self.context.key_column.take(np.asarray(users)).to_pylist()
        return found


def _why_useless(row_P: Tensor, layout: LoraLayout) -> str:
    """Why no store takes an adapter; "" where it does."""
    if not bool(row_P.isfinite().all()):
        return "weights are not finite"
    return "" if layout.has_effect(row_P) else "the adapter has no effect"
