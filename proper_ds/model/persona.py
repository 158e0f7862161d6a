"""PPlug: a user's history as one token, chosen for each input, and an instruction token, before a frozen base's input.

Liu et al. 2024 (arXiv 2409.11901) and its code (rucliujn/PPlug at 3718259). Negative token ids stand for the two: a
prompt stays a list of ids, so that training, scoring and generation are the same code for all methods.
Shapes: R rows, T tokens, I history items, E embedding size, D width of the base, P personal tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from proper_ds.model.config import NUM_PERSONAL
from proper_ds.model.routing import Rows, at_least_float
from proper_ds.model.weights_file import read_about

Tensor = torch.Tensor

KIND = "persona"
PERSONAL = tuple(-1 - number for number in range(NUM_PERSONAL))
"""Ids of the personal tokens, in their order before the input: the instruction's and the user's."""
_NUM_SAMPLED = 1024


class PersonaEmbedding(nn.Module):
    """A base's input embedding in which id -1 - p is personal token p of the row; see `Rows.prefix_RPD`."""

    def __init__(self, inner: nn.Module, rows: Rows) -> None:
        super().__init__()
        self.inner, self._rows = inner, rows

    def forward(self, ids_RT: Tensor) -> Tensor:
        """Embeddings [R, T, D]. The base's are read through its module, which ZeRO 3 makes whole for it."""
        found_RTD: Tensor = self.inner(ids_RT.clamp_min(0))
        row_K, column_K = (ids_RT < 0).nonzero(as_tuple=True)
        if not len(row_K):
            return found_RTD
        assert self._rows.prefix_RPD is not None, "personal tokens not set"
        own_KD = self._rows.prefix_RPD[row_K, -1 - ids_RT[row_K, column_K]]
        return found_RTD.index_put((row_K, column_K), own_KD.to(found_RTD.dtype))


def embedding_norm(embedding: nn.Module, vocab_size: int, device: torch.device | str) -> float:
    """The mean norm of the base's own input embeddings, over a sample of its vocabulary."""
    ids_T = torch.arange(0, vocab_size, max(1, vocab_size // _NUM_SAMPLED), device=device)
    with torch.no_grad():
        return float(embedding(ids_T.unsqueeze(0)).float().norm(dim=-1).mean())


@dataclass(frozen=True)
class PersonaInputs:
    """What personal tokens are made of, centred and of length 1; see `unit`.

    Attributes:
        question_RE: each row's question.
        keys_RIE: the questions of the items of each row's user.
        values_RIE: those items with their answers.
        is_item_RI: False where a row has fewer items, or one is left out.
    """

    question_RE: Tensor
    keys_RIE: Tensor
    values_RIE: Tensor
    is_item_RI: Tensor

    def without_history(self) -> PersonaInputs:
        """The same questions, asked by users without history."""
        return PersonaInputs(self.question_RE, self.keys_RIE, self.values_RIE, torch.zeros_like(self.is_item_RI))


def unit(embeddings_IE: Tensor, mean_E: Tensor) -> Tensor:
    """Embeddings without what they have in common, each of length 1.

    Sentence embeddings lie in a narrow cone, states of a language model all the more: what is left of a cosine there
    is the part that they share.
    """
    return nn.functional.normalize(embeddings_IE - mean_E, dim=-1)


@dataclass(frozen=True)
class PersonaSizes:
    """The numbers that a persona is built from.

    Attributes:
        norm: length of personal tokens: that of the base's own input embeddings.
    """

    embedding_size: int
    hidden_size: int
    temperature: float
    norm: float


class Persona(nn.Module):
    """`P_u = sum_i w_i Proj(v_i)`, w = softmax of `(M q) . k_i / temperature` over the user's items; and a token `I`.

    q, k_i and v_i are frozen embeddings of the question, the items' questions and the items with their answers. M
    begins as the identity. A user without history has `Proj(n)`, n learned and at first 0, the average item.
    """

    key_mean: Tensor
    value_mean: Tensor

    def __init__(self, sizes: PersonaSizes, seed: int) -> None:
        super().__init__()
        self.sizes = sizes
        size = sizes.embedding_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.user = _mlp(size, sizes.hidden_size)
            self.instruction = _mlp(size, sizes.hidden_size)
            self.instruction_vector = nn.Parameter(torch.rand(size))
        self.question = nn.Parameter(torch.eye(size))
        self.no_history = nn.Parameter(torch.zeros(size))
        self.register_buffer("key_mean", torch.zeros(size))
        self.register_buffer("value_mean", torch.zeros(size))

    def weights(self, inputs: PersonaInputs) -> Tensor:
        """How much each item counts for the row's question, [R, I]; rows sum to 1, or to 0 where there is no item."""
        kind = self.question.dtype
        question_RE = nn.functional.linear(inputs.question_RE.to(kind), self.question)
        scores_RI = torch.einsum("re,rie->ri", question_RE, inputs.keys_RIE.to(kind)) / self.sizes.temperature
        scores_RI = at_least_float(scores_RI).masked_fill(~inputs.is_item_RI, torch.finfo(torch.float32).min)
        return scores_RI.softmax(-1) * inputs.is_item_RI

    def forward(self, inputs: PersonaInputs) -> Tensor:
        """Personal tokens [R, P, D] of each row."""
        kind = self.question.dtype
        made_RID = self.user(inputs.values_RIE.to(kind))
        user_RD = torch.einsum("ri,rid->rd", self.weights(inputs).to(kind), made_RID)
        user_RD = torch.where(inputs.is_item_RI.any(1, keepdim=True), user_RD, self.user(self.no_history))
        instruction_RD = self.instruction(self.instruction_vector).expand_as(user_RD)
        both_RPD = at_least_float(torch.stack([instruction_RD, user_RD], dim=1))
        return nn.functional.normalize(both_RPD, dim=-1) * self.sizes.norm

    def description(self) -> dict[str, float]:
        """What is needed to rebuild it, besides its weights."""
        return asdict(self.sizes)

    @classmethod
    def load(cls, path: Path) -> Persona:
        """The persona in a file, frozen."""
        persona = cls(PersonaSizes(**read_about(path, KIND)), seed=0)
        persona.load_state_dict(load_file(path))
        return persona.requires_grad_(False)


def _mlp(inner: int, outer: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inner, outer), nn.GELU(), nn.Linear(outer, outer))
