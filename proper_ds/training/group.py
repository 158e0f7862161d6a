"""Stage 2, group: a mixture of LoRA experts with a user-aware router, on the merged base (PROPER, section 3.3)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from proper_ds.data.batches import Step
from proper_ds.data.tokens import HISTORY, Example
from proper_ds.files import seed_of
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.groups import GroupLevel
from proper_ds.model.lora import LoraLayout
from proper_ds.model.presets import PRESETS
from proper_ds.model.routing import constraint, entropy, imbalance, mean_gates
from proper_ds.model.user_vectors import pooled
from proper_ds.training.config import GroupConfig
from proper_ds.training.context import RunContext
from proper_ds.training.features import FeatureData
from proper_ds.training.rank_batch import RankBatch, dropout_keys, example_seed, numbers_of, rank_batch
from proper_ds.training.rank_stage import RankStage
from proper_ds.training.selection import num_history, table_line, training_examples, training_users

Tensor = torch.Tensor


class GroupModule(nn.Module):
    """The merged base with trained experts and routers.

    Loss: mean cross-entropy per target token, plus PROPER's constraint and, in preset `proper`, a balance term.
    """

    def __init__(
        self, model: PersonalModel, level: GroupLevel, dropout: float, constraint_weight: float, balance_weight: float
    ) -> None:
        super().__init__()
        self.level = level
        self.model = model
        self._constraint_weight, self._balance_weight = constraint_weight, balance_weight
        model.attach_groups(level.by_module(), dropout)

    def forward(self, inputs: RankBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, numbers to log)."""
        batch, rows = inputs.batch, inputs.rows
        if self.level.encoder is not None:
            rows.user_RU = self.level.encoder(inputs.features_RF, inputs.known_R)
        rows.gates = []
        self.model.set_rows(rows)
        losses_K = self.model.target_losses(batch.ids_RT, batch.row_K, batch.position_K, batch.target_K)
        ce = losses_K.sum() * inputs.weight
        gates = [gates_RTN.float() for _, gates_RTN in rows.gates]
        mask_RT = batch.mask_RT
        weight_R = torch.full_like(batch.length_R, 1, dtype=torch.float32) * inputs.weight
        means = [mean_gates(gates_RTN, mask_RT) for gates_RTN in gates]
        constrained_R = torch.stack([constraint(mean_RN) for mean_RN in means]).mean(0) * weight_R
        loss = ce / inputs.num_targets
        if self.level.preset.constraint_gradient:
            uneven = torch.stack([imbalance(mean_RN, weight_R) for mean_RN in means]).mean() * inputs.weight
            loss = loss + self._constraint_weight * constrained_R.sum() / inputs.num_rows
            loss = loss + self._balance_weight * uneven / inputs.num_parts
        else:  # released: the constraint is a constant in the loss, with weight 1
            loss = loss + (constrained_R.sum() / inputs.num_rows).detach()
        spread_RT = torch.stack([entropy(gates_RTN) for gates_RTN in gates]).mean(0)
        spread_R = mean_gates(spread_RT.unsqueeze(-1), mask_RT).squeeze(-1) * weight_R
        share_N = (torch.stack(means).mean(0) * weight_R.unsqueeze(-1)).sum(0)
        shares = {f"expert_{n}": share for n, share in enumerate(share_N)}
        tokens = batch.length_R.sum() * inputs.weight
        about = numbers_of(ce=ce, tokens=tokens, constraint=constrained_R.sum(), gate_entropy=spread_R.sum(), **shares)
        return loss, about


class GroupInputs:
    """Gives batches the rows' user features and table lines; shared by the group and router stages."""

    def __init__(
        self, context: RunContext, level: GroupLevel, seed: int, forget: float = 0.0, history_dropout: float = 0.0
    ) -> None:
        """`forget` and `history_dropout` are augmentations of the group stage; see GroupConfig."""
        self._device = context.device
        self._forget, self._history_dropout, self._seed = forget, history_dropout, seed
        self._history, self._num_lines = num_history(context.tokens), level.sizes["num_users"]
        folder = context.folder.stage("features").path
        self.features = FeatureData(folder) if level.encoder is not None else None

    def fill(self, made: RankBatch, number: int) -> None:
        """Add to a batch what the routers need.

        A row that trains on an item of its user's history gets a user vector made without that item.
        """
        lines = [table_line(e.user, self._history[e.user], self._num_lines) for e in made.examples]
        made.rows.table_R = torch.tensor(lines, device=self._device)
        if self.features is None:
            return
        found = [self._mean(self.features, example, number) for example in made.examples]
        known = [count > 0 and not self._forgets(number, e) for (_, count), e in zip(found, made.examples, strict=True)]
        made.features_RF = torch.stack([pooled_F for pooled_F, _ in found]).to(self._device)
        made.known_R = torch.tensor(known, device=self._device)

    def _forgets(self, number: int, example: Example) -> bool:
        if not self._forget:
            return False
        return example_seed(self._seed, "forget", number, example) < self._forget * (1 << 63)

    def _mean(self, features: FeatureData, example: Example, number: int) -> tuple[Tensor, int]:
        """(pooled features [F] of the user without this very item, number of items in them)."""
        items_IF = features.items(example.user)
        keep = np.ones(len(items_IF), dtype=bool)
        if self._history_dropout:
            generator = np.random.default_rng(example_seed(self._seed, "history", number, example))
            keep = generator.random(len(items_IF)) >= generator.uniform(0, self._history_dropout)
        if example.kind == HISTORY:
            keep[example.position] = False
        kept = torch.from_numpy(keep)
        return pooled(items_IF[kept].sum(0), int(keep.sum())), int(keep.sum())


class GroupStage(RankStage):
    """See the module's docstring."""

    section = "group"

    def __init__(self, context: RunContext, preset: str) -> None:
        super().__init__(context)
        self.name = f"group/{preset}"
        self._seed = seed_of(context.config.seed, self.name)
        lm = self.load_lm(with_population=True)
        settings = self.settings
        targets = find_targets(lm, settings.lora.target_modules, settings.lora.layers)
        layout = LoraLayout.of(targets, settings.lora)
        chosen = PRESETS[preset]
        features = FeatureData(context.folder.stage("features").path) if chosen.user_vector == "encoder" else None
        self._level = GroupLevel(
            layout,
            chosen,
            settings.num_experts,
            self._seed,
            feature_size=features.feature_size if features is not None else 0,
            user_vector_size=settings.user_vector_size if features is not None else 0,
            num_users=context.tokens.num_users if features is None else 0,
        )
        self._users = self._chosen_users(chosen.user_vector == "table")
        if features is not None and self._level.encoder is not None:
            mean_F, std_F = features.mean_and_std(self._users)
            self._level.encoder.mean.copy_(mean_F)
            self._level.encoder.std.copy_(std_F)
        self._buffers = {name: value.clone() for name, value in self._level.named_buffers()}
        self._inputs = GroupInputs(
            context, self._level, self._seed, settings.generic_user_probability, settings.history_dropout
        )
        self.module = GroupModule(
            PersonalModel(lm, targets),
            self._level,
            settings.lora.lora_dropout,
            settings.constraint_weight,
            settings.balance_weight,
        )

    def _chosen_users(self, has_table: bool) -> np.ndarray:
        tokens, split = self.context.tokens, self.context.config.data.train_split
        if has_table or self.settings.users == "all":
            return np.ones(tokens.num_users, dtype=bool)
        return training_users(tokens, split)

    @property
    def settings(self) -> GroupConfig:
        """See RankStage."""
        return self.context.config.group

    def indices(self) -> np.ndarray:
        """See RankStage."""
        split = self.context.config.data.train_split
        return training_examples(self.context.tokens, self.settings.train_on, self._users, split, self.section)

    def batch(self, indices: np.ndarray, step: Step, number: int) -> RankBatch:
        """See RankStage."""
        made = rank_batch(self.context.tokens, indices, step, self.context.device)
        self._inputs.fill(made, number)
        if self.settings.lora.lora_dropout:
            made.rows.key_R = dropout_keys(self._seed, number, made.examples, self.context.device)
        return made

    def finish(self, weights: dict[str, Tensor], folder: Path) -> None:
        """See RankStage."""
        level = GroupLevel(
            self._level.layout, self._level.preset, self._level.num_experts, self._seed, **self._level.sizes
        )
        values = {name.removeprefix("level."): value for name, value in weights.items()} | self._buffers
        level.load_state_dict(values)
        known = np.flatnonzero(num_history(self.context.tokens) > 0)
        level.set_unknown_user(torch.from_numpy(known) + 1)
        level.save(folder / "level.safetensors")
