"""Method PPlug: the maps that turn a user's history into a token before the input are trained, all else is frozen.

Run by `rank_jobs.py`; the base is as it was published, or has the population LoRA merged.
Shapes: R rows, T tokens, I history items, P personal tokens, E embedding size, D width of the base, K targets.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from proper_ds.data.batches import Step, collate
from proper_ds.data.indices import Indices
from proper_ds.distributed.ranks import Ranks
from proper_ds.distributed.sharded_base import gathering
from proper_ds.errors import AdapterError
from proper_ds.files import seed_of
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.persona import KIND, Persona, PersonaInputs, PersonaSizes, embedding_norm
from proper_ds.model.routing import Rows
from proper_ds.model.weights_file import save_weights
from proper_ds.training.config import PplugConfig
from proper_ds.training.context import RunContext
from proper_ds.training.embeddings import EmbeddingData
from proper_ds.training.persona_inputs import PplugInputs, check_room, with_personal
from proper_ds.training.rank_batch import RankBatch, example_seed, numbers_of
from proper_ds.training.rank_stage import RankStage
from proper_ds.training.selection import training_examples, training_users

Tensor = torch.Tensor

WEIGHTS = "persona.safetensors"


def stage_name(with_population: bool) -> str:
    """The stage's folder."""
    return f"pplug/{'population' if with_population else 'base'}"


class PplugModule(nn.Module):
    """The frozen base behind trained personal tokens; forward gives the mean loss per target token of the step."""

    def __init__(self, model: PersonalModel, persona: Persona) -> None:
        super().__init__()
        self.persona, self.model = persona, model
        model.attach_persona(True)

    def forward(self, inputs: RankBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, numbers to log)."""
        assert inputs.persona is not None
        batch = inputs.batch
        self._set(inputs.rows, inputs.persona)
        losses_K = self.model.target_losses(batch.ids_RT, batch.row_K, batch.position_K, batch.target_K)
        ce = losses_K.sum() * inputs.weight
        return ce / inputs.num_targets, numbers_of(ce=ce, tokens=batch.length_R.sum() * inputs.weight)

    def _set(self, rows: Rows, persona: PersonaInputs) -> None:
        rows.prefix_RPD = self.persona(persona)
        self.model.set_rows(rows)

    def effect(self, inputs: RankBatch) -> float:
        """The largest difference that users' histories make to any logit of a target; nan where one is."""
        assert inputs.persona is not None
        batch, found = inputs.batch, []
        with torch.no_grad():
            for persona in (inputs.persona, inputs.persona.without_history()):
                self._set(Rows(), persona)
                states_RTD = self.model.hidden(batch.ids_RT)
                found.append(self.model.logits_at(states_RTD, batch.row_K, batch.position_K).float())
        return float((found[0] - found[1]).abs().max())


class PplugStage(RankStage):
    """See the module's docstring."""

    section = "pplug"

    def __init__(self, context: RunContext, with_population: bool) -> None:
        super().__init__(context)
        self.name = stage_name(with_population)
        self._seed = seed_of(context.config.seed, self.name)
        lm, settings = self.load_lm(with_population), self.settings
        check_room(lm, context.config.base.max_length)
        with gathering(lm):
            norm = embedding_norm(lm.get_input_embeddings(), lm.config.get_text_config().vocab_size, context.device)
        embeddings = EmbeddingData(context.stage("embeddings").path)
        sizes = PersonaSizes(embeddings.embedding_size, context.hidden_size, settings.temperature, norm)
        persona = Persona(sizes, self._seed)
        split = context.config.data.train_split
        users = training_users(context.tokens, split)
        self._examples = training_examples(context.tokens, settings.train_on, users, split, self.section)
        self._any = self._examples.at(np.zeros(1, dtype=np.int64))
        key_mean_E, value_mean_E = embeddings.means(users)
        persona.key_mean.copy_(key_mean_E)
        persona.value_mean.copy_(value_mean_E)
        self._buffers = {name: value.clone() for name, value in persona.named_buffers()}
        self._about = persona.description()
        self._inputs = PplugInputs(embeddings, persona, context.device)
        self.module: PplugModule = PplugModule(PersonalModel(lm, {}), persona)

    @property
    def settings(self) -> PplugConfig:
        """See RankStage."""
        return self.context.config.pplug

    def indices(self) -> Indices:
        """See RankStage."""
        return self._examples

    def batch(self, indices: np.ndarray, step: Step, number: int) -> RankBatch:
        """See RankStage."""
        examples = self.context.tokens.examples(indices if len(indices) else self._any)
        seeds = [example_seed(self._seed, "history", number, example) for example in examples]
        batch = collate([with_personal(example) for example in examples], self.context.device)
        made = RankBatch(batch, 1.0 if len(indices) else 0.0, step.num_targets, step.num_rows)
        made.persona = self._inputs.of(examples, self.settings.history_dropout, seeds)
        return made

    def check_result(self, batch: RankBatch, ranks: Ranks) -> None:
        """See RankStage."""
        assert batch.persona is not None
        num_known = float(batch.persona.is_item_RI.any(1).sum())
        effect, num_known = ranks.sum([self.module.effect(batch), num_known])
        if not np.isfinite(effect):
            raise AdapterError(f"{self.name}: with the trained tokens logits are not finite; lower pplug.learning_rate")
        if effect == 0 and num_known:
            raise AdapterError(f"{self.name}: users' histories change no logit; raise pplug.learning_rate or max_steps")

    def finish(self, weights: dict[str, Tensor], folder: Path) -> None:
        """See RankStage."""
        tensors = {name.removeprefix("persona."): value for name, value in weights.items()} | self._buffers
        save_weights(folder / WEIGHTS, tensors, KIND, self._about, self.section)
