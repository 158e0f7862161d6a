"""Method PLoRA: one LoRA on the population model for all users, and a vector of each user's in a sharded table.

Run by `rank_jobs.py`. Shapes: R rows, L lines of the table, U user-vector size, K targets, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from proper_ds.data.batches import Step
from proper_ds.data.indices import Indices
from proper_ds.data.tokens import Example
from proper_ds.distributed.apart import AdamSettings, Apart
from proper_ds.distributed.ranks import Ranks
from proper_ds.distributed.user_table import NAME, ShardedTable
from proper_ds.errors import AdapterError
from proper_ds.files import seed_of
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.lora import LoraLayout
from proper_ds.model.plora import KIND, PersonalLoras, distance_of_generic
from proper_ds.model.routing import Rows
from proper_ds.model.weights_file import save_weights
from proper_ds.training.config import PloraConfig
from proper_ds.training.context import RunContext
from proper_ds.training.rank_batch import RankBatch, dropout_keys, example_seed, numbers_of, rank_batch
from proper_ds.training.rank_stage import RankStage
from proper_ds.training.selection import num_history, table_line, training_examples

Tensor = torch.Tensor

WEIGHTS = "level.safetensors"
"""Named as group levels are: `proper-ds forget` looks there for lines of user tables."""
Table = Callable[[Tensor], Tensor]
"""Lines [L] to vectors [L, U], with gradients; a collective."""


class PloraModule(nn.Module):
    """The merged base with one LoRA for all; the table of users' vectors is no submodule of it.

    Loss: mean cross-entropy per target token, and with a weight what generic predictions lack of the users' own.
    """

    def __init__(
        self, model: PersonalModel, shared: PersonalLoras, dropout: float, information_weight: float, table: Table
    ) -> None:
        super().__init__()
        self.shared, self.model = shared, model
        self._information_weight, self._table = information_weight, table
        model.attach_shared(shared.by_module(model.rows), dropout)

    def forward(self, inputs: RankBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, numbers to log)."""
        batch, rows = inputs.batch, inputs.rows
        rows.user_RU = self.vectors(inputs)
        tokens = batch.length_R.sum() * inputs.weight
        if not self._information_weight:
            self.model.set_rows(rows)
            losses_K = self.model.target_losses(batch.ids_RT, batch.row_K, batch.position_K, batch.target_K)
            ce = losses_K.sum() * inputs.weight
            return ce / inputs.num_targets, numbers_of(ce=ce, tokens=tokens)
        own_KV, generic_KV = self._both(inputs)
        ce = nn.functional.cross_entropy(own_KV, batch.target_K, reduction="sum") * inputs.weight
        distance = distance_of_generic(own_KV, generic_KV).sum() * inputs.weight
        loss = (ce + self._information_weight * distance) / inputs.num_targets
        return loss, numbers_of(ce=ce, tokens=2 * tokens, distance_of_generic=distance)

    def vectors(self, inputs: RankBatch) -> Tensor:
        """The rows' user vectors [R, U]. The generic user's is zero and no line of the table is asked for it."""
        assert inputs.line_R is not None
        known_R = inputs.line_R > 0
        found_LU = self._table(inputs.line_R[known_R])
        nobody_RU = found_LU.new_zeros(len(known_R), found_LU.shape[1])
        return nobody_RU.index_put((known_R.nonzero(as_tuple=True)[0],), found_LU)

    def _both(self, inputs: RankBatch) -> tuple[Tensor, Tensor]:
        """Logits [K, V] at the targets with the rows' vectors and with the generic user's.

        In one pass: gradient checkpointing runs layers again, and would find the rows of the last one.
        """
        batch, rows = inputs.batch, inputs.rows
        assert rows.user_RU is not None
        key_R = rows.key_R.repeat(2) if rows.key_R is not None else None
        self.model.set_rows(Rows(user_RU=torch.cat([rows.user_RU, torch.zeros_like(rows.user_RU)]), key_R=key_R))
        states_RTD = self.model.hidden(batch.ids_RT.repeat(2, 1))
        row_K = torch.cat([batch.row_K, batch.row_K + len(batch.ids_RT)])
        both_KV = self.model.logits_at(states_RTD, row_K, batch.position_K.repeat(2)).float()
        own_KV, generic_KV = both_KV.chunk(2)
        return own_KV, generic_KV

    def effect(self, inputs: RankBatch) -> float:
        """The largest difference that users' vectors make to any logit of a target; nan where one is. A collective."""
        with torch.no_grad():
            inputs.rows = Rows(user_RU=self.vectors(inputs))  # no dropout
            own_KV, generic_KV = self._both(inputs)
        return float((own_KV - generic_KV).abs().max())


class PloraStage(RankStage):
    """See the module's docstring."""

    name = section = "plora"

    def __init__(self, context: RunContext, ranks: Ranks) -> None:
        super().__init__(context)
        self._ranks, settings, tokens = ranks, self.settings, context.tokens
        self._seed = seed_of(context.config.seed, self.name)
        lm = self.load_lm(with_population=True)
        targets = find_targets(lm, settings.lora.target_modules, settings.lora.layers)
        shared = PersonalLoras(LoraLayout.of(targets, settings.lora), settings.user_vector_size, self._seed)
        self._about = shared.description()
        self._history = num_history(tokens)
        self._table: ShardedTable | None = None
        self.module: PloraModule = PloraModule(
            PersonalModel(lm, targets),
            shared,
            settings.lora.lora_dropout,
            settings.mutual_information_weight,
            self._look_up,
        )

    @property
    def settings(self) -> PloraConfig:
        """See RankStage."""
        return self.context.config.plora

    def apart(self, ds_config: dict[str, Any]) -> list[Apart]:
        """See RankStage."""
        settings = self.settings
        self._table = ShardedTable(
            1 + self.context.tokens.num_users,
            settings.user_vector_size,
            self._seed,
            self._ranks,
            AdamSettings.of(ds_config),
            spread=0.0,
            rate_ratio=settings.user_learning_rate / settings.learning_rate,
        )
        return [self._table]

    def _look_up(self, line_R: Tensor) -> Tensor:
        assert self._table is not None, "the table is made with the engine"
        return self._table(line_R)

    def indices(self) -> Indices:
        """See RankStage: histories of all users, as each has a vector, and questions of the training split."""
        tokens, split = self.context.tokens, self.context.config.data.train_split
        everybody = np.ones(tokens.num_users, dtype=bool)
        return training_examples(tokens, self.settings.train_on, everybody, split, self.section)

    def batch(self, indices: np.ndarray, step: Step, number: int) -> RankBatch:
        """See RankStage."""
        made = rank_batch(self.context.tokens, indices, step, self.context.device)
        lines = [self._line(example, number) if made.weight else 0 for example in made.examples]
        made.line_R = torch.tensor(lines, device=self.context.device)
        if self.settings.lora.lora_dropout:
            made.rows.key_R = dropout_keys(self._seed, number, made.batch)
        return made

    def _line(self, example: Example, number: int) -> int:
        forget = self.settings.generic_user_probability
        if forget and example_seed(self._seed, "forget", number, example) < forget * (1 << 63):
            return 0
        return table_line(example.user, int(self._history[example.user]), self.context.tokens.num_users)

    def check_result(self, batch: RankBatch, ranks: Ranks) -> None:
        """See RankStage."""
        assert batch.line_R is not None
        num_known = float((batch.line_R > 0).sum())
        effect, num_known = ranks.sum([self.module.effect(batch), num_known])
        if not np.isfinite(effect):
            raise AdapterError("plora: with the trained LoRA logits are not finite; lower plora.learning_rate")
        if effect == 0 and num_known:
            raise AdapterError(
                "plora: users' vectors change no logit; raise plora.user_learning_rate or max_steps, or choose other"
                " plora.lora.target_modules"
            )

    def finish(self, weights: dict[str, Tensor], folder: Path) -> None:
        """See RankStage."""
        shared = {name.removeprefix("shared."): value for name, value in weights.items() if name != NAME}
        save_weights(folder / WEIGHTS, shared | {NAME: weights[NAME]}, KIND, self._about, self.section)
