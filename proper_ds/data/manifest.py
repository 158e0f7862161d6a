"""The manifest of a prepared folder: what the shards hold and how prompts are made from it. Written last.

`prepare.py` writes it; `prepared.py` and `prompts.py` read it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from proper_ds.data.records import User
from proper_ds.data.tasks import Kind, Task
from proper_ds.errors import DataError
from proper_ds.files import write_text_atomic

VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class TaskManifest:
    """What the stages need to know of one task.

    Attributes:
        history_prompts: (before, after) the text of a history item, by the item's `prompt` index.
        generated: whether the data set says that it was generated, not collected.
        form: the task of `tasks.TASKS` that it has the form of; "" in folders that earlier versions prepared.
    """

    name: str
    lamp_id: str
    kind: Kind
    instruction: str
    history_prompts: tuple[tuple[str, str], ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    max_new_tokens: int
    generated: bool = False
    form: str = ""

    @classmethod
    def of(cls, task: Task, instruction: str, generated: bool) -> TaskManifest:
        """From a task and the instruction found in its questions."""
        prompts = []
        for pair in task.pairs:
            before, _, after = pair.prompt.partition("{}")
            prompts.append(((instruction if pair.instruction else "") + before, after))
        return cls(
            task.name,
            task.lamp_id,
            task.kind,
            instruction,
            tuple(prompts),
            task.labels,
            task.metrics,
            task.max_new_tokens,
            generated,
            task.form,
        )

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> TaskManifest:
        """The inverse of `asdict` through JSON."""
        prompts = tuple((before, after) for before, after in raw["history_prompts"])
        labels = tuple(raw["labels"]) if raw["labels"] is not None else None
        return cls(**(raw | {"history_prompts": prompts, "labels": labels, "metrics": tuple(raw["metrics"])}))


@dataclass(frozen=True)
class Shard:
    """One Parquet file of users; `first` is the index of its first user in the whole set."""

    file: str
    first: int
    num_users: int
    num_bytes: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """A prepared folder."""

    tasks: dict[str, TaskManifest]
    shards: list[Shard]
    num_users: int
    num_cold_users: int
    num_history_items: int
    splits: dict[str, dict[str, int]]
    """By split: `num_users` and `num_queries`."""
    sources: list[dict[str, Any]]
    set_aside: dict[str, int] = field(default_factory=dict)
    num_empty: int = 0
    """Rows that only keep a place: users who are forgotten, or no longer in the data. Part of `num_users`."""
    num_forgotten: int = 0
    """Users of the sources that were left out because they are forgotten."""
    num_near_duplicates: int = 0
    """Questions kept although a near copy stands in their user's history: data.near_duplicates=allow."""
    num_before_history: int = 0
    """Questions outside the training split that are older than some item of their user's history."""
    num_users_ahead: dict[str, int] = field(default_factory=dict)
    """By split other than the training split, users whose history holds what only later splits' profiles do."""
    num_taught_as_history: int = 0
    """Questions of the training split that have no answer of their own, because the history holds them."""
    limits: dict[str, int | dict[str, int]] = field(default_factory=dict)
    """Settings of `data` that left users or items out, for trying things out: `max_users_per_split`,
    `max_history_items`."""
    tune_share: float = 0
    """See DataConfig."""
    num_held_out: int = 0
    """Of `proper-ds data oppu-split`: the most active users, who are asked in split `test`; 0 for all other data."""
    from_rows: list[str] = field(default_factory=list)
    """Tasks that were read from JSONL or Parquet, so from nobody's published files, whatever they are called."""
    version: int = VERSION

    def write(self, folder: Path) -> None:
        """Commit the folder: this is the last write."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        write_text_atomic(folder / MANIFEST, text + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises DataError where there is none, or one of another version."""
        path = folder / MANIFEST
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(
                f"{folder} holds no {MANIFEST}: give a folder that `proper-ds data prepare` finished"
            ) from None
        except ValueError as error:
            raise DataError(f"{path} is no JSON ({error}); prepare the data again") from None
        if raw.get("version") != VERSION:
            raise DataError(f"{path} has version {raw.get('version')!r}, this is for {VERSION}; prepare the data again")
        raw["tasks"] = {name: TaskManifest.from_json(task) for name, task in raw["tasks"].items()}
        raw["shards"] = [Shard(**shard) for shard in raw["shards"]]
        return cls(**raw)


class Counts:
    """Counts users, items and questions while they are written."""

    def __init__(self) -> None:
        self.num_users = self.num_cold = self.num_items = self.num_empty = 0
        self._users: dict[str, int] = defaultdict(int)
        self._queries: dict[str, int] = defaultdict(int)

    def add(self, user: User) -> None:
        """One more user."""
        self.num_users += 1
        if not user.history and not user.queries:
            self.num_empty += 1
            return
        self.num_cold += user.is_cold
        self.num_items += len(user.history)
        for split in {query.split for query in user.queries}:
            self._users[split] += 1
        for query in user.queries:
            self._queries[query.split] += 1

    def splits(self) -> dict[str, dict[str, int]]:
        """See Manifest."""
        return {split: {"num_users": n, "num_queries": self._queries[split]} for split, n in self._users.items()}
