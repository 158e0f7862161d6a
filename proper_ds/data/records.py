"""The shapes in which people's data moves through proper_ds: everything that readers make and stages read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class HistoryItem:
    """One thing a user wrote, tagged or rated, as a training pair.

    Attributes:
        prompt: index into the task's `history_prompts`; its `{}` takes `text`.
        text: the item's own text, without the task's instruction.
        answer: what the model should have said.
        time: as the source has it (ISO date or number as text), or "".
        retrieval: the text to search when items are retrieved, where it differs from `text`, else "".
    """

    id: str
    task: str
    prompt: int
    text: str
    answer: str
    time: str = ""
    retrieval: str = ""


@dataclass(frozen=True, slots=True)
class Query:
    """One question of a user.

    Attributes:
        answer: None where the gold answer is hidden, and where a question of the training split is taught as an item of
            the history: it then only says that its user is one of those that shared stages learn from.
    """

    id: str
    split: str
    task: str
    input: str
    answer: str | None
    time: str = ""


@dataclass(slots=True)
class User:
    """One person: history oldest first, and questions."""

    key: str
    history: list[HistoryItem] = field(default_factory=list)
    queries: list[Query] = field(default_factory=list)

    @property
    def is_cold(self) -> bool:
        """Whether there is no history to learn from."""
        return not self.history

    def teaches(self, train_split: str) -> bool:
        """Whether this is a training user: one with a question in the training split, or with no question at all."""
        return not self.queries or any(query.split == train_split for query in self.queries)


@dataclass(frozen=True, slots=True)
class RawQuestion:
    """A question as a reader finds it, before its gold answer and its user's other questions are known.

    Attributes:
        record: position in the file, from 1, for messages.
        profile: the raw history items, as dictionaries.
        gold: the answer where the same record carries it (JSONL, Parquet), else None.
        has_query: False for a row that only brings history.
    """

    file: str
    record: int
    id: str
    user: str
    split: str
    input: str
    profile: list[dict[str, Any]]
    time: str = ""
    gold: str | None = None
    has_query: bool = True


@dataclass(frozen=True, slots=True)
class RawGold:
    """A gold answer as a reader finds it."""

    file: str
    record: int
    id: str
    split: str
    output: str
