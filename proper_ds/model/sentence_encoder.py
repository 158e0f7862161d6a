"""A frozen sentence encoder from a folder or the hub: texts to vectors, by mean or first-token pooling.

Knows transformers; `training/embeddings_job.py` batches for it. Shapes: N texts, T tokens, E embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from proper_ds.errors import AdapterError

Tensor = torch.Tensor
Pooling = Literal["mean", "cls"]

MAX_TOKENS = 512
"""Of a text; the rest is cut off. As PPlug does, whatever an encoder could take."""


class SentenceEncoder:
    """See the module's docstring."""

    def __init__(self, name: str, revision: str | None, pooling: Pooling, device: torch.device | str) -> None:
        """Raises AdapterError where the name or folder holds no encoder."""
        from transformers import AutoModel, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision)
            model: Any = AutoModel.from_pretrained(name, revision=revision)
        except (OSError, ValueError) as error:
            raise AdapterError(
                f"pplug.encoder {name!r} could not be loaded ({str(error).splitlines()[0][:200]}). Give a folder saved"
                " by save_pretrained or a Hugging Face name that this machine can reach, or leave it out: the frozen"
                " base embeds the texts then"
            ) from None
        self._model = model.requires_grad_(False).eval().to(device)
        self._device, self._pooling = device, pooling
        positions = getattr(model.config, "max_position_embeddings", MAX_TOKENS)
        self._longest = min(MAX_TOKENS, positions, self._tokenizer.model_max_length)

    @property
    def embedding_size(self) -> int:
        """E."""
        return int(self._model.config.hidden_size)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with the encoder's own marks around them."""
        if not texts:
            return []
        found: list[list[int]] = self._tokenizer(list(texts), truncation=True, max_length=self._longest)["input_ids"]
        return found

    def with_answer(self, text: str, answer: str) -> str:
        """`{text} {answer}`; the end of a long text is cut off, so that the answer is seen whole, or as far as it fits
        alone."""

        def shown(length: int) -> str:
            return f"{text[:length]} {answer}"

        if self._fits(shown(len(text))):
            return shown(len(text))
        fits, too_long = 0, len(text)
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            fits, too_long = (middle, too_long) if self._fits(shown(middle)) else (fits, middle)
        return shown(fits)

    def _fits(self, text: str) -> bool:
        return len(self._tokenizer(text)["input_ids"]) <= self._longest

    def embed(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Vectors [N, E] of texts in one pass, fp32 on the CPU."""
        width = max(len(row) for row in ids)
        ids_NT = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids], device=self._device)
        length_N = torch.tensor([len(row) for row in ids], device=self._device)
        mask_NT = torch.arange(width, device=self._device) < length_N[:, None]
        with torch.no_grad():
            states_NTE = self._model(input_ids=ids_NT, attention_mask=mask_NT.long()).last_hidden_state.float()
        if self._pooling == "cls":
            return states_NTE[:, 0].cpu()
        summed_NE = (states_NTE * mask_NT.unsqueeze(-1)).sum(1)
        return (summed_NE / length_N[:, None]).cpu()
