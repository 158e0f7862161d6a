"""Stage 2, group: a mixture of LoRA experts with a user-aware router, on the merged base (PROPER, section 3.3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from proper_ds.data.batches import Step
from proper_ds.data.indices import Indices
from proper_ds.distributed.apart import AdamSettings, Apart
from proper_ds.distributed.checkpoint import Checkpoint
from proper_ds.distributed.ds_config import offloads_optimizer
from proper_ds.distributed.expert_optim import ExpertAdamW
from proper_ds.distributed.expert_parallel import ExpertGroups, TokenExchange, largest_size
from proper_ds.distributed.ranks import Ranks
from proper_ds.distributed.recent_shares import RecentShares
from proper_ds.distributed.sharded_base import gathering
from proper_ds.distributed.user_table import NAME as TABLE
from proper_ds.distributed.user_table import ShardedTable
from proper_ds.errors import AdapterError, UserError
from proper_ds.files import atomic_path, seed_of
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import check_masks, find_targets
from proper_ds.model.expert_files import EXPERTS, MAX_WRITTEN, write_experts
from proper_ds.model.groups import GroupLevel, GroupSizes, save_level
from proper_ds.model.lora import LoraLayout
from proper_ds.model.presets import Preset, preset_of
from proper_ds.model.user_vectors import UserTable, fit_blocks, pooled
from proper_ds.observe.log import get_logger
from proper_ds.observe.metrics import MetricsFile
from proper_ds.training.config import GroupConfig
from proper_ds.training.context import RunContext
from proper_ds.training.features import FeatureData
from proper_ds.training.gate_log import GateLog
from proper_ds.training.group_inputs import GroupInputs
from proper_ds.training.group_module import GroupModule
from proper_ds.training.rank_batch import RankBatch, dropout_keys, rank_batch
from proper_ds.training.rank_stage import RankStage
from proper_ds.training.selection import num_history, training_examples, training_users

Tensor = torch.Tensor

MAX_CLUSTERED = 16_384
"""Blocks are made from the histories of so many users at most."""


class GroupStage(RankStage):
    """See the module's docstring."""

    section = "group"

    def __init__(self, context: RunContext, preset: str, ranks: Ranks) -> None:
        """A collective of all ranks."""
        super().__init__(context)
        self.name, self._ranks = f"group/{preset}", ranks
        self._seed = seed_of(context.config.seed, self.name)
        lm = self.load_lm(with_population=True)
        if self.settings.packing:
            with gathering(lm):
                check_masks(lm, "group.packing")
        settings = self.settings
        targets = find_targets(lm, settings.lora.target_modules, settings.lora.layers)
        layout = LoraLayout.of(targets, settings.lora)
        chosen = preset_of(preset, settings.user_vector, settings.divide_by_experts, settings.gate)
        self._groups = ExpertGroups.make(
            ranks, largest_size(context.config.distributed.expert_parallel_size, ranks.num_ranks)
        )
        features = FeatureData(context.stage("features").path) if chosen.user_vector == "encoder" else None
        sizes = group_sizes(settings, chosen, features, context.tokens.num_users)
        held = self._groups.share(sizes.num_experts)
        self._level = GroupLevel(layout, chosen, sizes, self._seed, held=held, with_table=False)
        self._users = self._chosen_users(chosen.user_vector == "table")
        if features is not None and self._level.encoder is not None:
            mean_F, std_F = features.mean_and_std(self._users)
            self._level.encoder.mean.copy_(mean_F)
            self._level.encoder.std.copy_(std_F)
            if sizes.num_blocks is not None:
                self._level.encoder.centroids.copy_(self._centroids(features, sizes.num_blocks))
        self._buffers = {name: value.clone() for name, value in self._level.named_buffers()}
        self._level.to(context.device)
        self._inputs = GroupInputs(
            context,
            self._level,
            self._seed,
            forget=settings.generic_user_probability if chosen.gate == "summed" else 0.0,
            history_dropout=settings.history_dropout,
        )
        crosses = self._groups.size > 1 and sizes.num_blocks is None
        self._shares = RecentShares(len(layout.modules), sizes.num_experts, ranks)
        self._table: ShardedTable | None = None
        self.module = GroupModule(
            PersonalModel(lm, targets),
            self._level,
            settings.lora.lora_dropout,
            settings.constraint_weight,
            settings.balance_weight,
            table=self._look_up,
            exchange=TokenExchange(self._groups) if crosses else None,
            shares=self._shares,
        )
        self._gates = GateLog(self.title, self.section, self._level)
        self.module.stats = self._gates.stats

    def about(self) -> dict[str, Any]:
        """See RankStage."""
        return {"expert_parallel_size": self._groups.size}

    def apart(self, ds_config: dict[str, Any]) -> list[Apart]:
        """See RankStage."""
        seed = seed_of(self._seed, "user table")
        found, self._table = group_apart(self._level, self._groups, ds_config, seed)
        return [self._shares, *found] if self._level.preset.constraint_gradient else found

    def _look_up(self, line_R: Tensor) -> Tensor:
        assert self._table is not None, "the table is made with the engine"
        return self._table(line_R)

    @property
    def num_owners(self) -> int:  # type: ignore[override]
        """See RankStage: with blocks, examples go to the ranks that hold their users' experts."""
        return 1 if self._level.sizes.num_blocks is None else self._groups.size

    def owner_of(self, indices: np.ndarray) -> np.ndarray:
        """See RankStage."""
        num_blocks = self._level.sizes.num_blocks
        assert num_blocks is not None
        users = self.context.tokens.users_of(indices)
        found: np.ndarray = self._inputs.blocks(users) * self._groups.size // num_blocks
        return found

    def _centroids(self, features: FeatureData, num_blocks: int) -> Tensor:
        """Made by the first rank, read by the others, so that all have the same bits."""
        path = self.context.stage(self.name).path / "blocks.safetensors"
        encoder = self._level.encoder
        assert encoder is not None
        if self._ranks.is_first and not path.exists():  # a stage that goes on keeps the blocks it was begun with
            users = np.flatnonzero(self._users & (num_history(self.context.tokens) > 0))
            users = np.random.default_rng(self._seed).permutation(users)[:MAX_CLUSTERED]
            pooled_UF = torch.stack([pooled(*features.user(int(user))) for user in users])
            try:
                centroids_BF = fit_blocks(encoder.normal(pooled_UF), num_blocks, self._seed)
            except ValueError as error:
                raise UserError(f"group.num_blocks: {error}; lower it") from None
            sizes = torch.bincount(torch.cdist(encoder.normal(pooled_UF), centroids_BF).argmin(1), minlength=num_blocks)
            about = "%s: %d users in %d blocks, %d to %d a block"
            get_logger().info(about, self.title, len(users), num_blocks, sizes.min(), sizes.max())
            with atomic_path(path) as temporary:
                save_file({"centroids": centroids_BF.contiguous()}, temporary)
        self._ranks.barrier()
        return load_file(path)["centroids"]

    def _chosen_users(self, has_table: bool) -> np.ndarray:
        tokens, split = self.context.tokens, self.context.config.data.train_split
        if has_table or self.settings.users == "all":
            return np.ones(tokens.num_users, dtype=bool)
        return training_users(tokens, split)

    @property
    def settings(self) -> GroupConfig:
        """See RankStage."""
        return self.context.config.group

    def indices(self) -> Indices:
        """See RankStage."""
        split = self.context.config.data.train_split
        return training_examples(self.context.tokens, self.settings.train_on, self._users, split, self.section)

    def batch(self, indices: np.ndarray, step: Step, number: int) -> RankBatch:
        """See RankStage."""
        packing = self.settings.packing
        made = rank_batch(self.context.tokens, indices, step, self.context.device, packing=packing)
        self._inputs.fill(made, number)
        if self.settings.lora.lora_dropout:
            made.rows.key_R = dropout_keys(self._seed, number, made.batch)
        return made

    def drop_counts(self) -> None:
        """See RankStage."""
        self._gates.drop()

    def log_more(self, ranks: Ranks) -> dict[str, Any]:
        """See RankStage."""
        return self._gates.numbers(ranks)

    def before_finish(self, checkpoint: Checkpoint) -> None:
        """See RankStage."""
        if self._level.encoder is None and self._ranks.is_first:
            steps = checkpoint.rows(f"num_steps/{TABLE}", 0, 1 + self._level.sizes.num_users)
            self._is_trained = steps > 0

    def finish(self, weights: dict[str, Tensor], folder: Path) -> None:
        """See RankStage."""
        if not any(value.any() for name, value in weights.items() if name.endswith(".lora_B")):
            raise AdapterError(f"{self.title}: no expert has any effect (all B are zero); raise group.learning_rate")
        tensors = weights | self._buffers
        if self._level.encoder is None:
            table = UserTable(*tensors["user_table.weight"].shape)
            table.weight.data.copy_(tensors["user_table.weight"])
            table.settle(self._is_trained)
            tensors["user_table.weight"] = table.weight.detach()
        save_level(folder / "level.safetensors", tensors, self._level.description(), self.section)
        level = GroupLevel.load(folder / "level.safetensors")
        self._write_experts(level, folder / EXPERTS)
        self._gates.finish(MetricsFile(self.context.folder.metrics), level.expert_weights())

    def _write_experts(self, level: GroupLevel, folder: Path) -> None:
        """PEFT directories of the experts, unless there are too many for files of their own."""
        if level.num_experts > MAX_WRITTEN:
            how = "`proper-ds experts` writes them as PEFT directories"
            get_logger().info("%s: %d experts are kept in one file; %s", self.title, level.num_experts, how)
            return
        base = self.context.config.base
        idle = write_experts(level, folder, range(level.num_experts), self.context.base_name, base.revision)
        if idle:
            numbers = ", ".join(map(str, idle))
            get_logger().warning("%s: experts %s have no effect, so no directory is written", self.title, numbers)


def group_apart(
    level: GroupLevel, groups: ExpertGroups, ds_config: dict[str, Any], seed: int
) -> tuple[list[Apart], ShardedTable | None]:
    """What trains a group level's experts and its user table, where the preset has one, beside DeepSpeed.

    Args:
        level: made with `with_table=False`, on its device.
        seed: of the table's initial lines.
    """
    settings, ranks = AdamSettings.of(ds_config), groups.ranks
    experts = {f"experts.{name}": held for name, held in level.experts.items()}
    states = torch.device("cpu") if offloads_optimizer(ds_config) else ranks.device
    found: list[Apart] = [ExpertAdamW(experts, level.num_experts, groups, settings, states)]  # type: ignore[arg-type]
    if level.encoder is not None:
        return found, None
    table = ShardedTable(1 + level.sizes.num_users, level.table_width, seed, ranks, settings)
    return [*found, table], table


def group_sizes(settings: GroupConfig, preset: Preset, features: FeatureData | None, num_users: int) -> GroupSizes:
    """The sizes of a group level; `proper-released` has all its experts for every token and user."""
    summed = preset.gate == "summed"
    return GroupSizes(
        num_experts=settings.num_experts,
        top_k=settings.top_k if summed else None,
        num_blocks=settings.num_blocks if summed else None,
        feature_size=features.feature_size if features is not None else 0,
        user_vector_size=settings.user_vector_size if summed else 0,
        num_users=num_users if features is None else 0,
    )
