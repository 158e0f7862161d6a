"""The frozen base with its additions: population LoRA, group experts and user slots on the targeted linear modules.

Shapes: R rows, T tokens, K target tokens, D in-features, E out-features, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from proper_ds.model.base import backbone
from proper_ds.model.dropout import row_dropout
from proper_ds.model.experts import ExpertMixture
from proper_ds.model.halves import Halves
from proper_ds.model.lora import SharedLora, SlotLora
from proper_ds.model.masks import text_mask
from proper_ds.model.persona import PersonaEmbedding
from proper_ds.model.places import at_places, find_top
from proper_ds.model.routing import Rows

Tensor = torch.Tensor

_SHARED, _GROUP, _USER = range(3)


class AdaptedLinear(nn.Module):
    """A frozen linear module plus whichever additions are switched on: `W x + shared + user + group`.

    The user's addition is computed before the group's, because the LoRA-aware router reads it.
    """

    def __init__(self, base: nn.Linear, name: str, number: int, rows: Rows) -> None:
        super().__init__()
        self.base = base
        self.name, self.number, self.rows = name, number, rows
        self.shared: SharedLora | None = None
        self.user: SlotLora | None = None
        self.group: ExpertMixture | None = None
        self.dropout = [0.0, 0.0, 0.0]

    def _dropped(self, x_RTD: Tensor, kind: int) -> Tensor:
        p, key_R = self.dropout[kind], self.rows.key_R
        return x_RTD if p == 0 or key_R is None else row_dropout(x_RTD, key_R, self.number * 3 + kind, p)

    def forward(self, x_RTD: Tensor) -> Tensor:
        """The module's output with all additions."""
        y_RTE = self.base(x_RTD)
        user_RTE = None
        if self.shared is not None:
            y_RTE = y_RTE + self.shared(self._dropped(x_RTD, _SHARED))
        if self.user is not None:
            assert self.rows.slot_R is not None, "row slots not set"
            user_RTE = self.user(self._dropped(x_RTD, _USER), self.rows.slot_R)
            y_RTE = y_RTE + user_RTE
        if self.group is not None:
            y_RTE = y_RTE + self.group(self.name, x_RTD, self._dropped(x_RTD, _GROUP), user_RTE, self.rows)
        return y_RTE


class PersonalModel(nn.Module):
    """A base whose targeted modules take additions; one set of rows is set before each forward pass."""

    def __init__(self, lm: Any, targets: dict[str, nn.Linear]) -> None:
        """Wraps the modules found by `find_targets`, in place."""
        super().__init__()
        self.lm = lm
        self.rows = Rows()
        self.adapted: dict[str, AdaptedLinear] = {}
        for number, (name, linear) in enumerate(targets.items()):
            wrapped = AdaptedLinear(linear, name, number, self.rows)
            parent, _, leaf = name.rpartition(".")
            setattr(lm.get_submodule(parent), leaf, wrapped)
            self.adapted[name] = wrapped
        for module in find_top(backbone(lm)):
            at_places(module, self.rows)

    @property
    def device(self) -> torch.device:
        """Where the base lies."""
        found: torch.device = self.lm.device
        return found

    def set_rows(self, rows: Rows) -> None:
        """Tell the modules about the rows of the next forward passes."""
        for name in Rows.__dataclass_fields__:
            setattr(self.rows, name, getattr(rows, name))

    def attach_shared(self, loras: dict[str, SharedLora] | None, dropout: float = 0.0) -> None:
        """Switch a population LoRA on, or off with None."""
        for name, module in self.adapted.items():
            module.shared = loras.get(name) if loras is not None else None
            module.dropout[_SHARED] = dropout if module.shared is not None else 0.0

    def attach_users(self, slots: dict[str, SlotLora] | None, dropout: float = 0.0) -> None:
        """Switch user slots on, or off with None."""
        for name, module in self.adapted.items():
            module.user = slots.get(name) if slots is not None else None
            module.dropout[_USER] = dropout if module.user is not None else 0.0

    def attach_groups(self, mixtures: dict[str, ExpertMixture] | None, dropout: float = 0.0) -> None:
        """Switch group experts on, or off with None."""
        for name, module in self.adapted.items():
            module.group = mixtures.get(name) if mixtures is not None else None
            module.dropout[_GROUP] = dropout if module.group is not None else 0.0

    def attach_persona(self, is_on: bool) -> None:
        """Let negative token ids stand for the rows' own input embeddings, or put the base's embedding back."""
        embedding = self.lm.get_input_embeddings()
        if is_on and not isinstance(embedding, PersonaEmbedding):
            self.lm.set_input_embeddings(PersonaEmbedding(embedding, self.rows))
        if not is_on and isinstance(embedding, PersonaEmbedding):
            self.lm.set_input_embeddings(embedding.inner)

    @property
    def has_dropout(self) -> bool:
        """Whether any addition drops out, so that rows need their keys."""
        return any(any(module.dropout) for module in self.adapted.values())

    def hidden(self, ids_RT: Tensor, position_RT: Tensor | None = None, mask_R1TT: Tensor | None = None) -> Tensor:
        """Last hidden states [R, T, D] of right-padded rows.

        No attention mask is needed where each row is one text: padding stands behind the real tokens, where causal
        attention does not look. Rows that hold several texts give positions, and what is added to attention scores.
        """
        given = {} if position_RT is None else {"position_ids": position_RT, "attention_mask": mask_R1TT}
        states: Tensor = backbone(self.lm)(input_ids=ids_RT, use_cache=False, **given).last_hidden_state
        return states

    def halves(self, first_layer: int) -> Halves:
        """The base cut before a layer. Raises AdapterError where it cannot be."""
        whole = backbone(self.lm)
        found = Halves(whole, first_layer)
        additions = [(m, m.shared, m.user, m.group) for m in self.adapted.values()]
        for module in self.adapted.values():  # they need rows, of which there are none yet
            module.shared = module.user = module.group = None
        try:
            found.check(whole, self.device)
        finally:
            for module, shared, user, group in additions:
                module.shared, module.user, module.group = shared, user, group
        return found

    @property
    def head_weight(self) -> Tensor:
        """The output embedding [V, D]."""
        found: Tensor = self.lm.get_output_embeddings().weight
        return found

    def logits_at(self, states_RTD: Tensor, row_K: Tensor, position_K: Tensor) -> Tensor:
        """Logits [K, V] at the given rows and positions only."""
        found: Tensor = self.lm.get_output_embeddings()(states_RTD[row_K, position_K])
        return found

    def target_losses(
        self,
        ids_RT: Tensor,
        row_K: Tensor,
        column_K: Tensor,
        target_K: Tensor,
        place_RT: Tensor | None = None,
        text_RT: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy [K] of each target token of right-padded rows; see `losses_at`.

        Args:
            place_RT, text_RT: of rows that hold several texts, each token's place in its text, and which text it is.
        """
        mask_R1TT = text_mask(text_RT, self.lm.dtype) if text_RT is not None else None
        return self.losses_at(self.hidden(ids_RT, place_RT, mask_R1TT), row_K, column_K, target_K)

    def losses_at(self, states_RTD: Tensor, row_K: Tensor, column_K: Tensor, target_K: Tensor) -> Tensor:
        """Cross-entropy [K] of each target token, in at least fp32.

        Args:
            states_RTD: last hidden states.
            row_K, column_K: where each target is predicted, one before where it stands.
            target_K: the tokens to be predicted.
        """
        logits_KV = self.logits_at(states_RTD, row_K, column_K)
        exact = logits_KV if logits_KV.dtype == torch.float64 else logits_KV.float()
        return nn.functional.cross_entropy(exact, target_K, reduction="none")
