"""Text to tokens: the one place that turns history items and questions into prompts, for training and answering.

Every method and stage builds its prompts here, so that what is trained on is what is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from proper_ds.data.manifest import TaskManifest
from proper_ds.data.records import HistoryItem
from proper_ds.errors import DataError

CACHED_TEXTS = 4096
"""Texts whose number of tokens is remembered: items of a user are retrieved many times."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt and answer; the answer (with its end token) starts at `num_prompt`.

    Attributes:
        num_cut: prompt tokens left out to fit `max_length`.
    """

    ids: list[int]
    num_prompt: int
    num_cut: int


class PromptEncoder:
    """`{input}{suffix} {answer}{eos}`, cut on the input side only.

    The prompt's head is kept, because instructions stand there; the suffix and the answer always stay whole.
    """

    def __init__(self, tokenizer: Any, suffix: str, max_length: int) -> None:
        """Takes a Hugging Face tokenizer. Raises DataError where it has no end-of-text token."""
        if tokenizer.eos_token_id is None:
            raise DataError("the base's tokenizer has no eos_token: answers could not end; use another base")
        self._tokenizer = tokenizer
        self.max_length = max_length
        self.eos = int(tokenizer.eos_token_id)
        self._suffix_text = suffix
        self._suffix = self._plain(suffix)
        self._num_special = len(self._head("a")) - len(self._plain("a"))
        self.count: Callable[[str], int] = lru_cache(CACHED_TEXTS)(lambda text: len(self._plain(text)))

    def _plain(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _head(self, text: str) -> list[int]:
        """A text at the beginning of an example."""
        head = list(self._tokenizer(text)["input_ids"])
        if len(head) > 1 and head[-1] == self.eos:
            head.pop()  # some tokenizers end every text by themselves
        return head

    def room(self, num_reserved: int) -> int:
        """How many tokens a prompt's text may have if `num_reserved` are kept for the answer."""
        return self.max_length - len(self._suffix) - num_reserved - self._num_special

    def cut(self, text: str, num_tokens: int) -> str:
        """The text, or as much of its beginning as `num_tokens` tokens hold."""
        if self.count(text) <= num_tokens:
            return text
        kept = self._plain(text)[: max(0, num_tokens)]
        return str(self._tokenizer.decode(kept, skip_special_tokens=True)).rstrip("\ufffd")  # half a character

    def answer_ids(self, answer: str) -> list[int]:
        """The answer as it is tokenised after the suffix, with the end token.

        Tokenised together with the suffix; where a token would straddle the border, on its own.
        """
        joined = self._plain(f"{self._suffix_text} {answer}")
        cut = len(self._suffix)
        ids = joined[cut:] if joined[:cut] == self._suffix else self._plain(f" {answer}")
        return [*ids, self.eos]

    def prompt_ids(self, text: str, num_reserved: int) -> tuple[list[int], int]:
        """(ids, number cut) of a prompt that leaves room for `num_reserved` answer tokens.

        Raises:
            DataError: when the answer alone leaves no room for a prompt.
        """
        head = self._head(text)
        room = self.max_length - len(self._suffix) - num_reserved
        if room < 1:
            raise DataError(
                f"an answer of {num_reserved} tokens leaves no room for a prompt in base.max_length {self.max_length};"
                " answers are never cut: raise base.max_length"
            )
        return head[:room] + self._suffix, max(0, len(head) - room)

    def encode(self, text: str, answer: str, num_reserved: int = 0) -> Encoded:
        """Prompt and answer of one training pair; the prompt leaves room for `num_reserved` tokens at least.

        What questions reserve: a prompt cut by its own answer's length would tell which answer follows.
        """
        answer_ids = self.answer_ids(answer)
        prompt, num_cut = self.prompt_ids(text, max(num_reserved, len(answer_ids)))
        return Encoded(prompt + answer_ids, len(prompt), num_cut)

    def question(self, text: str, num_reserved: int) -> Encoded:
        """A prompt to be answered, with room for `num_reserved` tokens."""
        prompt, num_cut = self.prompt_ids(text, num_reserved)
        return Encoded(prompt, len(prompt), num_cut)

    def label_ids(self, task: TaskManifest) -> list[list[int]]:
        """The ids of each label. Raises DataError where the tokenizer cannot tell two labels apart."""
        ids = [self.answer_ids(label) for label in task.labels or ()]
        seen: dict[tuple[int, ...], str] = {}
        for label, found in zip(task.labels or (), ids, strict=True):
            other = seen.setdefault(tuple(found), label)
            if other != label:
                raise DataError(f"task {task.name}: the base's tokenizer reads {other!r} and {label!r} alike")
            if len(found) == 1:
                raise DataError(f"task {task.name}: the base's tokenizer cannot write the label {label!r}; use another")
        return ids

    def visible(self, text: str) -> str:
        """`text` as the tokenizer can write it: what to compare generated answers with."""
        return str(self._tokenizer.decode(self.answer_ids(text), skip_special_tokens=True)).strip()

    def decode(self, ids: list[int]) -> str:
        """Generated ids as text, up to the first end token."""
        if self.eos in ids:
            ids = ids[: ids.index(self.eos)]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()


def history_prompt(task: TaskManifest, item: HistoryItem) -> str:
    """The training prompt of a history item."""
    before, after = task.history_prompts[item.prompt]
    return f"{before}{item.text}{after}"
