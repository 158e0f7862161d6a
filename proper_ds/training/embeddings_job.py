"""What the fleet's actors run for PPlug: embeddings of each unit's questions and history items.

Shapes: I history items, Q questions, N texts, E embedding size, R rows, T tokens, D width of the base.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from proper_ds.data.batches import collate, length_batches
from proper_ds.data.prompts import history_prompt
from proper_ds.data.tokens import HISTORY, QUERY, Example
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.sentence_encoder import SentenceEncoder
from proper_ds.training.context import RunContext
from proper_ds.training.embeddings import UserEmbeddings, write_embeddings
from proper_ds.training.unit_jobs import UserRange

if TYPE_CHECKING:
    from proper_ds.config import RunConfig

Tensor = torch.Tensor


class EmbeddingsJob:
    """Embeds with `pplug.encoder`, or with the frozen base where there is none; see Job."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._context, settings = RunContext(config, device), config.pplug
        self._budget = config.evaluation.num_tokens_per_batch
        self._encoder: SentenceEncoder | None = None
        self._model: PersonalModel | None = None
        if settings.encoder is not None:
            self._encoder = SentenceEncoder(settings.encoder, settings.encoder_revision, settings.pooling, device)
        else:
            self._model = PersonalModel(self._context.load_lm(with_population=False), {})

    def run(self, unit: UserRange) -> dict[str, Any]:
        """See Job."""
        start_s = time.perf_counter()
        made, num_tokens = self._by_base(unit) if self._model is not None else self._by_encoder(unit)
        write_embeddings(self._context.stage("embeddings").path, unit.first, made)
        seconds = time.perf_counter() - start_s
        return {"num_users": len(made), "num_tokens": num_tokens, "seconds": seconds}

    def _by_base(self, unit: UserRange) -> tuple[list[UserEmbeddings], int]:
        """From the tokenised examples: one pass embeds an item with and without its answer."""
        assert self._model is not None
        tokens, examples, counts = self._context.tokens, list[Example](), list[tuple[int, int]]()
        for user in range(unit.first, unit.stop):
            own = tokens.examples_of(*tokens.range_of(user))
            parts = [[e for e in own if e.kind == kind] for kind in (HISTORY, QUERY)]
            counts.append((len(parts[0]), len(parts[1])))
            examples += [example for part in parts for example in part]
        prompts_ND, answers_ND = base_embeddings(self._model, examples, self._budget)
        found, start = [], 0
        for num_items, num_queries in counts:
            middle, stop = start + num_items, start + num_items + num_queries
            found.append(UserEmbeddings(prompts_ND[start:middle], answers_ND[start:middle], prompts_ND[middle:stop]))
            start = stop
        return found, sum(len(example.ids) for example in examples)

    def _by_encoder(self, unit: UserRange) -> tuple[list[UserEmbeddings], int]:
        """From the texts."""
        encoder, prefix = self._encoder, self._context.config.pplug.query_prefix
        assert encoder is not None
        tasks = self._context.prepared.manifest.tasks
        texts, counts = list[str](), list[tuple[int, int]]()
        for user in self._context.prepared.users(unit.first, unit.stop):
            asked = [history_prompt(tasks[item.task], item) for item in user.history]
            texts += [f"{prefix}{text}" for text in asked]
            texts += [encoder.with_answer(text, item.answer) for text, item in zip(asked, user.history, strict=True)]
            texts += [f"{prefix}{query.input}" for query in user.queries]
            counts.append((len(user.history), len(user.queries)))
        ids = encoder.ids(texts)
        lengths = [len(row) for row in ids]
        found_NE = in_batches(lengths, self._budget, lambda part: encoder.embed([ids[n] for n in part]))
        if found_NE is None:
            found_NE = torch.zeros(0, encoder.embedding_size)
        sizes = [size for num_items, num_queries in counts for size in (num_items, num_items, num_queries)]
        parts = found_NE.split(sizes)
        found = [UserEmbeddings(*parts[3 * number : 3 * number + 3]) for number in range(len(counts))]
        return found, sum(lengths)


def in_batches(lengths: Sequence[int], num_tokens: int, embed: Callable[[list[int]], Tensor]) -> Tensor | None:
    """What `embed` makes of the positions, a batch of similar lengths at a time, in order; None where there is none."""
    rows: dict[int, Tensor] = {}
    for part in length_batches(lengths, num_tokens):
        rows |= dict(zip(part, embed(part), strict=True))
    return torch.stack([rows[number] for number in range(len(lengths))]) if rows else None


def base_embeddings(model: PersonalModel, examples: Sequence[Example], num_tokens: int) -> tuple[Tensor, Tensor]:
    """The mean of the last hidden states over each prompt [N, D], and over each answer [N, D], fp32 on the CPU.

    A prompt's states do not depend on what follows; those of an answer have read the prompt. Zero without an answer.

    Args:
        num_tokens: padded tokens in one pass.
    """

    def embed(part: list[int]) -> Tensor:
        batch = collate([examples[number] for number in part], model.device)
        with torch.no_grad():
            states_RTD = model.hidden(batch.ids_RT).float()
        num_prompt_R = torch.tensor([examples[number].num_prompt for number in part], device=model.device)
        place_T = torch.arange(states_RTD.shape[1], device=model.device)
        is_prompt_RT = place_T < num_prompt_R[:, None]
        return torch.stack([_mean(states_RTD, is_prompt_RT), _mean(states_RTD, batch.mask_RT & ~is_prompt_RT)], 1).cpu()

    found_N2D = in_batches([len(example.ids) for example in examples], num_tokens, embed)
    if found_N2D is None:
        found_N2D = torch.zeros(0, 2, model.lm.config.get_text_config().hidden_size)
    return found_N2D[:, 0].contiguous(), found_N2D[:, 1].contiguous()


def _mean(states_RTD: Tensor, mask_RT: Tensor) -> Tensor:
    weight_RT1 = mask_RT.unsqueeze(-1).float()
    return (states_RTD * weight_RT1).sum(1) / weight_RT1.sum(1).clamp_min(1)
