"""Stage 1, population: one LoRA over everybody's data, written as a PEFT directory (PROPER, section 3.2)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from proper_ds.data.batches import Step
from proper_ds.data.indices import Indices
from proper_ds.distributed.ranks import Ranks
from proper_ds.distributed.sharded_base import gathering
from proper_ds.errors import AdapterError
from proper_ds.files import seed_of
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.adapter_file import peft_config, save_peft
from proper_ds.model.base import check_masks, find_targets
from proper_ds.model.lora import LoraLayout, SharedLora
from proper_ds.model.routing import Rows
from proper_ds.training.config import PopulationConfig
from proper_ds.training.context import RunContext
from proper_ds.training.rank_batch import RankBatch, dropout_keys, numbers_of, rank_batch
from proper_ds.training.rank_stage import RankStage
from proper_ds.training.selection import training_examples, training_users

Tensor = torch.Tensor


class PopulationModule(nn.Module):
    """The base with one trained LoRA; forward gives the mean loss per target token of the whole step."""

    def __init__(self, model: PersonalModel, layout: LoraLayout, dropout: float, seed: int) -> None:
        super().__init__()
        self.loras = nn.ModuleList(
            SharedLora(shape.in_features, shape.out_features, layout.r, layout.scaling, seed_of(seed, shape.name))
            for shape in layout.modules
        )
        self.model = model
        by_module = {shape.name: lora for shape, lora in zip(layout.modules, self.loras, strict=True)}
        self._by_module: dict[str, SharedLora] = by_module  # type: ignore[assignment]
        self._dropout = dropout
        model.attach_shared(self._by_module, dropout)

    def forward(self, inputs: RankBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, numbers to log)."""
        self.model.set_rows(inputs.rows)
        batch = inputs.batch
        losses_K = self.model.target_losses(
            batch.ids_RT, batch.row_K, batch.position_K, batch.target_K, batch.place_RT, batch.text_RT
        )
        ce = losses_K.sum() * inputs.weight
        return ce / inputs.num_targets, numbers_of(ce=ce, tokens=batch.length_R.sum() * inputs.weight)

    def effect(self, inputs: RankBatch) -> float:
        """The largest difference that the LoRA makes to any logit where a target is predicted; nan where one is."""
        batch = inputs.batch
        self.model.set_rows(Rows())  # no dropout
        found = []
        try:
            with torch.no_grad():
                for loras in (self._by_module, None):
                    self.model.attach_shared(loras, self._dropout)
                    states_RTD = self.model.hidden(batch.ids_RT)
                    found.append(self.model.logits_at(states_RTD, batch.row_K, batch.position_K).float())
        finally:
            self.model.attach_shared(self._by_module, self._dropout)
        return float((found[0] - found[1]).abs().max())


class PopulationStage(RankStage):
    """See the module's docstring."""

    name = section = "population"

    def __init__(self, context: RunContext) -> None:
        super().__init__(context)
        lm = self.load_lm(with_population=False)
        if self.settings.packing:
            with gathering(lm):
                check_masks(lm, "population.packing")
        lora = self.settings.lora
        targets = find_targets(lm, lora.target_modules, lora.layers)
        self._layout = LoraLayout.of(targets, lora)
        self._seed = seed_of(context.config.seed, "population")
        self.module: PopulationModule = PopulationModule(
            PersonalModel(lm, targets), self._layout, lora.lora_dropout, self._seed
        )

    @property
    def settings(self) -> PopulationConfig:
        """See RankStage."""
        return self.context.config.population

    def indices(self) -> Indices:
        """See RankStage."""
        tokens, split = self.context.tokens, self.context.config.data.train_split
        return training_examples(tokens, self.settings.train_on, training_users(tokens, split), split, self.section)

    def batch(self, indices: np.ndarray, step: Step, number: int) -> RankBatch:
        """See RankStage."""
        packing = self.settings.packing
        made = rank_batch(self.context.tokens, indices, step, self.context.device, packing=packing)
        if self.settings.lora.lora_dropout:
            made.rows.key_R = dropout_keys(self._seed, number, made.batch)
        return made

    def check_result(self, batch: RankBatch, ranks: Ranks) -> None:
        """See RankStage."""
        effects = ranks.sum([self.module.effect(batch)])
        if not np.isfinite(effects[0]):
            raise AdapterError("population: with the trained adapter logits are not finite; lower its learning_rate")
        if effects[0] == 0:
            raise AdapterError(
                "population: the trained adapter changes no logit; raise its learning_rate or max_steps, or choose"
                " other lora.target_modules"
            )

    def finish(self, weights: dict[str, Tensor], folder: Path) -> None:
        """See RankStage."""
        lora, base = self.settings.lora, self.context.config.base
        about = peft_config(self._layout, lora.target_modules, lora.lora_dropout, self.context.base_name, base.revision)
        save_peft(folder / "adapter", population_row(weights, self._layout), self._layout, about)


def population_row(weights: dict[str, Tensor], layout: LoraLayout) -> Tensor:
    """The trained adapter [P] from a PopulationModule's weights by name."""
    parts = []
    for number in range(len(layout.modules)):
        parts += [weights[f"loras.{number}.lora_A"].flatten(), weights[f"loras.{number}.lora_B"].flatten()]
    return torch.cat(parts)
