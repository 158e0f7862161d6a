"""Stage 3.2, router: a LoRA-aware router, shared by all users, re-mixes the groups given each user's own LoRA.

Everything but the new routers is frozen (PROPER, section 3.4). Fitted on a sample of users (`router.max_users`), whose
adapters are read from the store by micro-batch. The jump in loss when the gates are exchanged is logged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from proper_ds.data.batches import Step, collate
from proper_ds.data.indices import Indices
from proper_ds.distributed.checkpoint import any_complete
from proper_ds.distributed.engine import RankEngine
from proper_ds.distributed.expert_parallel import ExpertGroups, TokenExchange, largest_size
from proper_ds.distributed.ranks import Ranks
from proper_ds.files import atomic_path, seed_of
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.groups import GroupLevel
from proper_ds.model.lora import SlotBuffers
from proper_ds.model.routing import Router
from proper_ds.observe.log import get_logger
from proper_ds.observe.metrics import MetricsFile
from proper_ds.training.config import RouterConfig
from proper_ds.training.context import RunContext
from proper_ds.training.gate_log import GateLog
from proper_ds.training.group_inputs import GroupInputs
from proper_ds.training.group_module import GroupModule
from proper_ds.training.rank_batch import RankBatch, dropout_keys, rank_batch
from proper_ds.training.rank_stage import CHECKPOINT, RankStage
from proper_ds.training.selection import router_users, training_examples
from proper_ds.training.user_adapters import UserAdapters

Tensor = torch.Tensor

NUM_PROBED = 64
"""Examples that the jump is measured on."""


class RouterStage(RankStage):
    """See the module's docstring."""

    section = "router"

    def __init__(self, context: RunContext, preset: str, ranks: Ranks) -> None:
        """A collective of all ranks."""
        super().__init__(context)
        self.name, self._ranks = self._name_of(preset), ranks
        config, settings, tokens = context.config, self.settings, context.tokens
        self._seed = seed_of(config.seed, self.name)
        self._path = context.stage(f"group/{preset}").path / "level.safetensors"
        groups = ExpertGroups.make(ranks, largest_size(config.distributed.expert_parallel_size, ranks.num_ranks))
        held = groups.share(config.group.num_experts)
        self._level = GroupLevel.load(self._path, held).to(context.device)
        self._old = {name: mixture.router for name, mixture in self._level.by_module().items()}
        self._level.add_lora_routers(self._seed)  # only these ask for gradients: the loaded level is frozen
        self._adapters = UserAdapters(context, preset)
        self._inputs = GroupInputs(context, self._level, self._seed)
        names = sorted({*config.user.lora.target_modules, *config.group.lora.target_modules})
        lm = self.load_lm(with_population=True)
        self._model = PersonalModel(lm, find_targets(lm, names))
        # one for each row that a micro-batch can have
        num_slots = settings.per_device_train_batch_size
        self._slots = SlotBuffers(self._adapters.layout, num_slots, torch.float32, context.device, trainable=False)
        self._model.attach_users(self._slots.modules(), config.user.lora.lora_dropout)
        self.module = GroupModule(
            self._model,
            self._level,
            config.group.lora.lora_dropout,
            0.0,
            0.0,
            exchange=TokenExchange(groups) if groups.size > 1 else None,
        )
        self._gates = GateLog(self.title, self.section, self._level)
        self.module.stats = self._gates.stats
        self._users = self._chosen_users()
        self._examples = training_examples(
            tokens, settings.train_on, self._users, config.data.train_split, self.section
        )

    def _chosen_users(self) -> np.ndarray:
        """Mask over the users to learn from. Decided anew until there is a checkpoint, which is of these users.

        A collective.
        """
        folder = self.context.stage(self.name).path
        path = folder / "users.npy"
        if any_complete(folder / CHECKPOINT, self._ranks):
            found: np.ndarray = np.load(path, allow_pickle=False)
            return found
        settings, config = self.settings, self.context.config
        split = config.data.train_split
        mask = router_users(self.context.tokens, settings.users, settings.max_users, split, config.seed)
        mask = self._adapters.stored(mask)
        mask = self._adapters.without_damaged(mask, settings.max_damaged_share, self._ranks, self.title)
        if self._ranks.is_first:
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.save(file, mask, allow_pickle=False)
        self._ranks.barrier()
        return mask

    @staticmethod
    def _name_of(preset: str) -> str:
        return f"router/{preset}"

    def before_start(self, engine: RankEngine, metrics: MetricsFile) -> None:
        """Log the loss of a sample under the gates that user adapters were fitted with, and under the new ones."""
        new = {name: mixture.router for name, mixture in self._level.by_module().items()}
        self._route_by(self._old)
        before = self._probe(engine)
        self._route_by(new)
        after = self._probe(engine)
        self.drop_counts()  # of what was probed
        if self._ranks.is_first:
            metrics.log(self.title, event="gates exchanged", loss_user_gates=before, loss_lora_gates=after)
            get_logger().info(
                "%s: loss %.4f under user-aware gates, %.4f after the exchange", self.title, before, after
            )

    def _route_by(self, routers: dict[str, Router]) -> None:
        for name, mixture in self._level.by_module().items():
            mixture.router = routers[name]

    def _probe(self, engine: RankEngine) -> float:
        """Mean loss of a few examples, which all ranks share; through the engine, which may hold the base in shards."""
        num_probed = min(NUM_PROBED, len(self._examples))
        order = np.random.default_rng(self._seed).choice(len(self._examples), num_probed, replace=False)
        size = self.settings.per_device_train_batch_size
        rounds = -(-len(order) // (size * self._ranks.num_ranks))
        parts = np.array_split(self._examples.at(np.sort(order)), rounds * self._ranks.num_ranks)
        ce = num_targets = 0.0
        for part in parts[self._ranks.rank :: self._ranks.num_ranks]:
            examples = self.context.tokens.examples(part if len(part) else self._any())
            made = RankBatch(collate(examples, self.context.device), float(len(part) > 0), 1, 1)
            self._fill(made, 0)
            with torch.no_grad():
                _, numbers = engine.module(made)
            ce += float(numbers["ce"])
            num_targets += made.weight * sum(example.num_targets for example in examples)
        total, count = self._ranks.sum([ce, num_targets])
        return total / count

    @property
    def settings(self) -> RouterConfig:
        """See RankStage."""
        return self.context.config.router

    def indices(self) -> Indices:
        """See RankStage."""
        return self._examples

    def _any(self) -> np.ndarray:
        """An example for a rank that has none: its user must have an adapter."""
        return self._examples.at(np.zeros(1, dtype=np.int64))

    def batch(self, indices: np.ndarray, step: Step, number: int) -> RankBatch:
        """See RankStage."""
        made = rank_batch(self.context.tokens, indices if len(indices) else self._any(), step, self.context.device)
        made.weight = 1.0 if len(indices) else 0.0
        self._fill(made, number)
        config = self.context.config
        if config.user.lora.lora_dropout or config.group.lora.lora_dropout:
            made.rows.key_R = dropout_keys(self._seed, number, made.batch)
        return made

    def _fill(self, made: RankBatch, number: int) -> None:
        """Add to a batch what routers need, and say in which slot each row's user sits."""
        self._inputs.fill(made, number)
        made.rows.slot_R = torch.tensor(self._seat(made), device=self.context.device)

    def _seat(self, made: RankBatch) -> list[int]:
        """Load the rows' users into slots; each row's slot."""
        users = sorted({example.user for example in made.examples})
        self._slots.weights_SP[: len(users)] = self._adapters.rows(users).to(self.context.device)
        slot_of = {user: slot for slot, user in enumerate(users)}
        return [slot_of[example.user] for example in made.examples]

    def drop_counts(self) -> None:
        """See RankStage."""
        self._gates.drop()

    def log_more(self, ranks: Ranks) -> dict[str, Any]:
        """See RankStage."""
        return self._gates.numbers(ranks)

    def finish(self, weights: dict[str, Tensor], folder: Path) -> None:
        """See RankStage."""
        level = GroupLevel.load(self._path)
        level.add_lora_routers(self._seed)
        missing = level.load_state_dict(weights, strict=False)
        assert not missing.unexpected_keys, missing.unexpected_keys
        level.save(folder / "level.safetensors", self.section)
        self._gates.finish(MetricsFile(self.context.folder.metrics), None)
