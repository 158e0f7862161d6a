"""Stage 3.2, router: a LoRA-aware router, shared by all users, re-mixes the groups given each user's own LoRA.

Everything but the new routers is frozen (PROPER, section 3.4). The jump in loss when the gates are exchanged is logged.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from proper_ds.data.batches import Step, collate
from proper_ds.data.tokens import Example
from proper_ds.distributed.sharded_base import gathering
from proper_ds.files import seed_of
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.groups import GroupLevel
from proper_ds.model.lora import SlotBuffers
from proper_ds.observe.log import get_logger
from proper_ds.observe.metrics import MetricsFile
from proper_ds.store.elsewhere import open_store
from proper_ds.training.config import RouterConfig
from proper_ds.training.context import RunContext
from proper_ds.training.group import GroupInputs, GroupModule
from proper_ds.training.rank_batch import RankBatch, dropout_keys, rank_batch
from proper_ds.training.rank_stage import RankStage
from proper_ds.training.selection import router_users, training_examples

Tensor = torch.Tensor

NUM_PROBED = 64


class RouterStage(RankStage):
    """See the module's docstring."""

    section = "router"

    def __init__(self, context: RunContext, preset: str) -> None:
        super().__init__(context)
        self.name = f"router/{preset}"
        config = context.config
        self._seed = seed_of(config.seed, self.name)
        lm = self.load_lm(with_population=True)
        self._level = GroupLevel.load(context.folder.stage(f"group/{preset}").path / "level.safetensors")
        self._store = open_store(context.folder.stage(f"store/{preset}").path)
        self._inputs = GroupInputs(context, self._level, self._seed)
        names = sorted({*config.user.lora.target_modules, *config.group.lora.target_modules})
        self._model = PersonalModel(lm, find_targets(lm, names))
        settings = self.settings
        # one slot for each row that a micro-batch can have, and for each probed row
        num_slots = max(settings.per_device_train_batch_size, NUM_PROBED)
        self._slots = SlotBuffers(self._store.layout, num_slots, torch.float32, context.device, trainable=False)
        self._model.attach_users(self._slots.modules(), config.user.lora.lora_dropout)
        self.module = GroupModule(self._model, self._level, config.group.lora.lora_dropout, 0.0, 0.0)
        tokens, split = context.tokens, config.data.train_split
        mask = router_users(tokens, settings.users, settings.max_users, split, config.seed)
        has = np.asarray([self._store.has(key) for key in context.keys])
        self._examples = training_examples(tokens, settings.train_on, mask & has, split, self.section)
        self._probe_and_exchange()

    def _probe_and_exchange(self) -> None:
        """Measure the loss of a sample under the old gates, exchange the routers, measure again."""
        order = np.random.default_rng(self._seed).permutation(len(self._examples))[:NUM_PROBED]
        examples = self.context.tokens.examples(np.sort(self._examples[order]))
        self.module.to(self.context.device)
        self._before = self._loss(examples)
        self._level.add_lora_routers(self._seed)  # only these ask for gradients: the loaded level is frozen
        self.module.to(self.context.device)
        self._after = self._loss(examples)

    def _loss(self, examples: list[Example]) -> float:
        made = RankBatch(collate(examples, self.context.device), 1.0, 1, 1, 1)
        self._fill(made, 0)
        with gathering(self.module):
            _, numbers = self.module(made)
        return float(numbers["ce"]) / sum(example.num_targets for example in examples)

    def before_start(self, metrics: MetricsFile) -> None:
        """Log the jump."""
        before, after = self._before, self._after
        metrics.log(self.name, event="gates exchanged", loss_user_gates=before, loss_lora_gates=after)
        get_logger().info("%s: loss %.4f under user-aware gates, %.4f after the exchange", self.name, before, after)

    @property
    def settings(self) -> RouterConfig:
        """See RankStage."""
        return self.context.config.router

    def indices(self) -> np.ndarray:
        """See RankStage."""
        return self._examples

    def batch(self, indices: np.ndarray, step: Step, number: int) -> RankBatch:
        """See RankStage."""
        made = rank_batch(
            self.context.tokens, indices if len(indices) else self._examples[:1], step, self.context.device
        )
        made.weight = 1.0 if len(indices) else 0.0
        self._fill(made, number)
        return made

    def _fill(self, made: RankBatch, number: int) -> None:
        """Load the rows' users into slots, and say which row sits where."""
        self._inputs.fill(made, number)
        users = sorted({example.user for example in made.examples})
        keys = self.context.keys
        rows = self._store.get_many([keys[user] for user in users])
        self._slots.weights_SP[: len(users)] = rows.to(self.context.device)
        slot_of = {user: slot for slot, user in enumerate(users)}
        slots = [slot_of[example.user] for example in made.examples]
        made.rows.slot_R = torch.tensor(slots, device=self.context.device)
        config = self.context.config
        if config.user.lora.lora_dropout or config.group.lora.lora_dropout:
            made.rows.key_R = dropout_keys(self._seed, number, made.examples, self.context.device)

    def finish(self, weights: dict[str, Tensor], folder: Path) -> None:
        """See RankStage."""
        level = GroupLevel.load(
            self.context.folder.stage(f"group/{self._level.preset.name}").path / "level.safetensors"
        )
        level.add_lora_routers(self._seed)
        missing = level.load_state_dict(
            {name.removeprefix("level."): value for name, value in weights.items()}, strict=False
        )
        assert not missing.unexpected_keys, missing.unexpected_keys
        level.save(folder / "level.safetensors")
