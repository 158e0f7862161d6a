"""PLoRA: one LoRA for all users, with a vector of each user's added in its rank space.

Zhang et al. 2024 (arXiv 2403.06208) and its code (yoyo-yun/PLoRA at c880d98: ppeft/plora.py, trainer.py).
Shapes: R rows, T tokens, D in-features, E out-features, r LoRA rank, U user-vector size, K target tokens, V vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from proper_ds.files import seed_of
from proper_ds.model.lora import LoraLayout, SharedLora
from proper_ds.model.routing import Rows
from proper_ds.model.weights_file import read_about

Tensor = torch.Tensor

KIND = "plora"
TABLE = "user_table.weight"
"""The users' vectors, a line each; line 0 is the generic user's, and zero."""
TEMPERATURE = 4.0
"""Of the mutual information loss, as in the released code."""


class PersonalLora(SharedLora):
    """`scaling * B (A x + P p_u)`; the vector p_u of a row's user is read from the rows, zero for the generic user."""

    def __init__(self, in_features: int, out_features: int, layout: LoraLayout, size: int, seed: int) -> None:
        super().__init__(in_features, out_features, layout.r, layout.scaling, seed)
        bound = 1 / math.sqrt(size)
        generator = torch.Generator().manual_seed(seed_of(seed, "user"))
        self.lora_P = nn.Parameter(torch.empty(layout.r, size).uniform_(-bound, bound, generator=generator))
        self.rows: Rows | None = None

    def forward(self, x_RTD: Tensor) -> Tensor:
        """The addition to the module's output."""
        assert self.rows is not None and self.rows.user_RU is not None, "user vectors not set"
        kind = x_RTD.dtype
        code_RTr = nn.functional.linear(x_RTD, self.lora_A.to(kind))
        own_Rr = nn.functional.linear(self.rows.user_RU.to(kind), self.lora_P.to(kind))
        code_RTr = code_RTr + self.rows.by_token(own_Rr)
        return nn.functional.linear(code_RTr, self.lora_B.to(kind)) * self.scaling


class PersonalLoras(nn.Module):
    """A PersonalLora for each module of a layout."""

    def __init__(self, layout: LoraLayout, user_vector_size: int, seed: int) -> None:
        super().__init__()
        self.layout, self.user_vector_size = layout, user_vector_size
        self.loras = nn.ModuleList(
            PersonalLora(m.in_features, m.out_features, layout, user_vector_size, seed_of(seed, m.name))
            for m in layout.modules
        )

    def by_module(self, rows: Rows) -> dict[str, SharedLora]:
        """To be attached to a model with these rows."""
        found: dict[str, SharedLora] = {}
        for shape, lora in zip(self.layout.modules, self.loras, strict=True):
            assert isinstance(lora, PersonalLora)
            lora.rows = rows
            found[shape.name] = lora
        return found

    def description(self) -> dict[str, Any]:
        """What is needed to rebuild it, besides its weights."""
        return {"layout": self.layout.to_json(), "user_vector_size": self.user_vector_size}

    @classmethod
    def load(cls, path: Path) -> tuple[PersonalLoras, Tensor]:
        """(the shared part of a file, frozen; the users' vectors [1 + users, U])."""
        about, tensors = read_about(path, KIND), load_file(path)
        table_LU = tensors.pop(TABLE)
        found = cls(LoraLayout.from_json(about["layout"]), about["user_vector_size"], seed=0)
        found.load_state_dict(tensors)
        return found.requires_grad_(False), table_LU


def distance_of_generic(own_KV: Tensor, generic_KV: Tensor) -> Tensor:
    """`KL(p(y | x, u) || p(y | x))` at each target token, [K]: lower where the generic user tells more of the users.

    Both distributions are softened by TEMPERATURE. Only the generic one is trained by it, towards the users'.

    Args:
        own_KV, generic_KV: logits with each row's own vector, and with the generic user's.
    """
    own = (own_KV.detach().float() / TEMPERATURE).log_softmax(-1)
    generic = (generic_KV.float() / TEMPERATURE).log_softmax(-1)
    return (own.exp() * (own - generic)).sum(-1)
