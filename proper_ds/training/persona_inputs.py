"""What PPlug's personal tokens are made of, looked up by example; the same for training and for answering.

Shapes: R rows, I history items, E embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from proper_ds.data.tokens import HISTORY, Example
from proper_ds.errors import AdapterError
from proper_ds.model.persona import PERSONAL, Persona, PersonaInputs, unit
from proper_ds.training.embeddings import EmbeddingData

Tensor = torch.Tensor


def with_personal(example: Example) -> Example:
    """The example behind its personal tokens."""
    return replace(example, ids=np.asarray([*PERSONAL, *example.ids]), num_prompt=example.num_prompt + len(PERSONAL))


def check_room(lm: Any, max_length: int) -> None:
    """Raise AdapterError where a base has no positions for personal tokens before the longest example."""
    positions = getattr(lm.config, "max_position_embeddings", None)
    if positions is not None and max_length + len(PERSONAL) > positions:
        raise AdapterError(
            f"PPlug puts {len(PERSONAL)} tokens before the input: base.max_length {max_length} leaves no room for them"
            f" in the {positions} positions of the base; lower it to {positions - len(PERSONAL)}"
        )


class PplugInputs:
    """Looks up what personal tokens are made of; the same for training and for answering."""

    def __init__(self, embeddings: EmbeddingData, persona: Persona, device: torch.device) -> None:
        self._embeddings, self._device = embeddings, device
        # the engine may round the persona's own
        self._key_mean, self._value_mean = persona.key_mean.cpu().clone(), persona.value_mean.cpu().clone()

    def of(self, examples: Sequence[Example], dropout: float = 0.0, seeds: Sequence[int] = ()) -> PersonaInputs:
        """The inputs of a row for each example.

        An item that is trained on sees the items before it only; a question sees the user's whole history.

        Args:
            dropout: forget a random share of each history, up to this; drawn from `seeds`, one an example.
        """
        assert not dropout or len(seeds) == len(examples), "dropout is drawn from seeds"
        rows = [self._row(example, dropout, seeds[number] if dropout else 0) for number, example in enumerate(examples)]
        num_items = max(1, *(len(keys_IE) for _, keys_IE, _ in rows))
        question_RE = torch.stack([question_E for question_E, _, _ in rows])
        keys_RIE = question_RE.new_zeros(len(rows), num_items, question_RE.shape[1])
        values_RIE, is_item_RI = torch.zeros_like(keys_RIE), torch.zeros(len(rows), num_items, dtype=torch.bool)
        for row, (_, keys_IE, values_IE) in enumerate(rows):
            keys_RIE[row, : len(keys_IE)], values_RIE[row, : len(keys_IE)] = keys_IE, values_IE
            is_item_RI[row, : len(keys_IE)] = True
        return PersonaInputs(*(part.to(self._device) for part in (question_RE, keys_RIE, values_RIE, is_item_RI)))

    def _row(self, example: Example, dropout: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """(question [E], keys [I, E], values [I, E])."""
        own = self._embeddings.user(example.user)
        is_item = example.kind == HISTORY
        question_E = (own.keys_IE if is_item else own.queries_QE)[example.position]
        stop = example.position if is_item else len(own.keys_IE)
        keys_IE, values_IE = own.keys_IE[:stop], own.values_IE[:stop]
        if dropout and stop:
            generator = np.random.default_rng(seed)
            kept_I = torch.from_numpy(generator.random(stop) >= generator.uniform(0, dropout))
            keys_IE, values_IE = keys_IE[kept_I], values_IE[kept_I]
        return (
            unit(question_E, self._key_mean),
            unit(keys_IE, self._key_mean),
            unit(values_IE, self._value_mean),
        )
