"""What answers for methods beyond LoRAs and groups: personal tokens (PPlug), PLoRA's vectors, merged adapters.

`predict_job.py` switches one on, asks it for the rows of each batch, and knows nothing else of it. Each user's rows
are made of that user's own data and of what training users taught.
Shapes: R rows, S slots, P numbers of an adapter, N anchors, F feature size, k neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from proper_ds.data.tokens import Example
from proper_ds.errors import StoreError
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.lora import SlotBuffers
from proper_ds.model.merge import merged_layout, merged_row, nearest
from proper_ds.model.persona import PERSONAL, Persona
from proper_ds.model.plora import PersonalLoras
from proper_ds.model.routing import Rows
from proper_ds.model.user_vectors import pooled
from proper_ds.store.elsewhere import open_store
from proper_ds.training import plora, pplug
from proper_ds.training.anchors import merge_anchors
from proper_ds.training.context import RunContext
from proper_ds.training.embeddings import EmbeddingData
from proper_ds.training.features import FeatureData
from proper_ds.training.persona_inputs import PplugInputs, check_room
from proper_ds.training.selection import num_history, table_line, training_users

Tensor = torch.Tensor

MAX_ROWS = 64
"""Examples that `rows` takes at once."""


class Addition(Protocol):
    """What one method adds to the base, or to the base with the population LoRA merged.

    Attributes:
        num_experts: of its groups; 0 without.
    """

    num_experts: int

    def attach(self, model: PersonalModel) -> None:
        """Switch it on; whoever calls has switched everything else off."""

    def detach(self, model: PersonalModel) -> None:
        """Switch it off."""

    def rows(self, examples: Sequence[Example]) -> tuple[Rows, list[bool]]:
        """(what the model must know of a batch of questions, which rows are answered by something personal)."""

    def prompt(self, ids_T: np.ndarray) -> np.ndarray:
        """The prompt as this method asks it."""


class PplugAnswers:
    """Personal tokens before the prompt."""

    num_experts = 0

    def __init__(self, context: RunContext, with_population: bool) -> None:
        path = context.stage(pplug.stage_name(with_population)).path / pplug.WEIGHTS
        self._persona = Persona.load(path).to(context.device)
        embeddings = EmbeddingData(context.stage("embeddings").path)
        self._inputs = PplugInputs(embeddings, self._persona, context.device)
        self._max_length = context.config.base.max_length

    def attach(self, model: PersonalModel) -> None:
        """See Addition."""
        check_room(model.lm, self._max_length)
        model.attach_persona(True)

    def detach(self, model: PersonalModel) -> None:
        """See Addition."""
        model.attach_persona(False)

    def rows(self, examples: Sequence[Example]) -> tuple[Rows, list[bool]]:
        """See Addition. Tokens are made user by user: histories differ much in length, and padding would cost."""
        made = [self._inputs.of([example]) for example in examples]
        with torch.no_grad():
            prefix_RPD = torch.cat([self._persona(inputs) for inputs in made])
        return Rows(prefix_RPD=prefix_RPD), [bool(inputs.is_item_RI.any()) for inputs in made]

    def prompt(self, ids_T: np.ndarray) -> np.ndarray:
        """See Addition."""
        return np.concatenate([np.asarray(PERSONAL, dtype=ids_T.dtype), ids_T])


class PloraAnswers:
    """The users' vectors in one LoRA's rank space."""

    num_experts = 0

    def __init__(self, context: RunContext) -> None:
        shared, self._table_LU = PersonalLoras.load(context.stage("plora").path / plora.WEIGHTS)
        self._shared, self._device = shared.to(context.device), context.device
        self._history = num_history(context.tokens)

    def attach(self, model: PersonalModel) -> None:
        """See Addition."""
        loras = self._shared.by_module(model.rows)
        assert loras.keys() <= model.adapted.keys(), "PLoRA adapts modules that the model does not wrap"
        model.attach_shared(loras)

    def detach(self, model: PersonalModel) -> None:
        """See Addition."""
        model.attach_shared(None)

    def rows(self, examples: Sequence[Example]) -> tuple[Rows, list[bool]]:
        """See Addition. Who came after the training is the generic user."""
        num_users = len(self._table_LU) - 1
        lines = [table_line(e.user, int(self._history[e.user]), num_users) for e in examples]
        return Rows(user_RU=self._table_LU[lines].to(self._device)), [line > 0 for line in lines]

    def prompt(self, ids_T: np.ndarray) -> np.ndarray:
        """See Addition."""
        return ids_T


class MergedAnswers:
    """For each user a merge of the adapters of the most similar training users; without history the population."""

    num_experts = 0

    def __init__(self, context: RunContext) -> None:
        self._context, config = context, context.config
        self._settings, self._history = config.merge, num_history(context.tokens)
        self._features = FeatureData(context.stage("features").path)
        self._mean_F, self._std_F = self._features.mean_and_std(training_users(context.tokens, config.data.train_split))
        self._store = open_store(context.stage("store/OPPU").path)
        chosen = np.flatnonzero(merge_anchors(context.tokens, config))
        self._anchors = [user for user in chosen.tolist() if self._store.has(context.keys[user])]
        if not self._anchors:
            raise StoreError("method merged: store/OPPU has no adapter of a training user; train the set again")
        self._anchors_NF = torch.stack([self._normal(user) for user in self._anchors])
        self._wide = merged_layout(self._store.layout, min(self._settings.num_neighbours, len(self._anchors)))
        self._slots = SlotBuffers(self._wide, MAX_ROWS, torch.float32, context.device, trainable=False)

    def _normal(self, user: int) -> Tensor:
        """The user's standardised features [F]."""
        return (pooled(*self._features.user(user)) - self._mean_F) / self._std_F

    def attach(self, model: PersonalModel) -> None:
        """See Addition."""
        model.attach_users(self._slots.modules())

    def detach(self, model: PersonalModel) -> None:
        """See Addition."""
        model.attach_users(None)

    def rows(self, examples: Sequence[Example]) -> tuple[Rows, list[bool]]:
        """See Addition. Users without history share a slot of zeros."""
        assert len(examples) <= MAX_ROWS, "a slot for each user"
        known = sorted({example.user for example in examples if self._history[example.user]})
        found = {user: self._nearest(user) for user in known}
        needed = sorted({n for positions_k, _ in found.values() for n in positions_k.tolist()})
        place = {n: row for row, n in enumerate(needed)}
        adapters_NP = self._store.get_many([self._context.keys[self._anchors[n]] for n in needed])
        self._slots.weights_SP.zero_()
        for slot, (positions_k, weight_k) in enumerate(found.values()):
            own_kP = adapters_NP[[place[n] for n in positions_k.tolist()]]
            self._slots.weights_SP[slot] = merged_row(own_kP, weight_k, self._store.layout, self._wide)
        slot_of = {user: slot for slot, user in enumerate(known)}
        slots = [slot_of.get(example.user, len(known) % MAX_ROWS) for example in examples]
        personal = [example.user in slot_of for example in examples]
        return Rows(slot_R=torch.tensor(slots, device=self._context.device)), personal

    def _nearest(self, user: int) -> tuple[Tensor, Tensor]:
        settings = self._settings
        return nearest(self._normal(user), self._anchors_NF, settings.num_neighbours, settings.temperature)

    def prompt(self, ids_T: np.ndarray) -> np.ndarray:
        """See Addition."""
        return ids_T
