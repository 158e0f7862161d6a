"""The tokenised data: one row per example in Arrow files that every rank and actor maps into memory.

Made once from the prepared shards; the stages read examples by index and users by range.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from proper_ds.data.mapped import MappedRows
from proper_ds.data.prepared import PreparedData
from proper_ds.data.prompt_maker import PromptMaker
from proper_ds.data.prompts import Encoded, PromptEncoder
from proper_ds.data.recipe import PromptRecipe
from proper_ds.data.records import User
from proper_ds.files import atomic_path, write_json_atomic

HISTORY, QUERY, BLANK = 0, 1, -1
"""Kinds of examples; a blank one keeps the place of a forgotten user's."""
EXAMPLES_PER_FILE = 50_000
ROWS_PER_BATCH = 1_000
USERS_PER_DIGEST = 1_024
EXAMPLES_PER_BLOCK = 5_000
"""What is read of a column at once; a file is a whole number of blocks."""
Progress = Callable[[str, int, int | None], None]
MARKER = "tokens.json"

SCHEMA = pa.schema(
    [
        ("user", pa.int32()),
        ("kind", pa.int8()),
        ("split", pa.int8()),
        ("task", pa.int8()),
        ("position", pa.int32()),
        ("has_answer", pa.bool_()),
        ("num_prompt", pa.int32()),
        ("num_tokens", pa.int32()),
        ("input_ids", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised training pair or question.

    Attributes:
        user: index of the user in the prepared data.
        kind: HISTORY or QUERY.
        position: index in the user's history or queries.
        ids: prompt and, where it has one, answer.
    """

    user: int
    kind: int
    task: int
    position: int
    num_prompt: int
    ids: np.ndarray

    @property
    def num_targets(self) -> int:
        """Answer tokens, end token included."""
        return len(self.ids) - self.num_prompt


class _Writer:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: list[dict[str, Any]] = []
        self._pending = pa.Table.from_pylist([], schema=SCHEMA)
        self.files: list[str] = []

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) >= ROWS_PER_BATCH:
            self._gather()
            if self._pending.num_rows >= EXAMPLES_PER_FILE:
                self.close()

    def _gather(self) -> None:
        table = pa.Table.from_pylist(self._rows, schema=SCHEMA)
        self._pending, self._rows = pa.concat_tables([self._pending, table]), []

    def close(self) -> None:
        self._gather()
        if not self._pending.num_rows:
            return
        name = f"examples-{len(self.files):05d}.arrow"
        with (
            atomic_path(self._folder / name) as path,
            pa.OSFile(str(path), "wb") as sink,
            pa.ipc.new_stream(sink, SCHEMA) as stream,
        ):
            stream.write_table(self._pending, max_chunksize=ROWS_PER_BATCH)
        self.files.append(name)
        self._pending = self._pending.slice(0, 0)


def tokenize(
    prepared: PreparedData,
    encoder: PromptEncoder,
    folder: Path,
    train_split: str,
    max_new_tokens: int | None,
    progress: Progress = lambda what, done, total: None,
    maker: PromptMaker | None = None,
) -> None:
    """Write the tokenised examples of every user; `tokens.json` is the last write.

    Args:
        train_split: only this split's questions carry their answers; all others are prompts that know no gold.
        max_new_tokens: room that prompts leave for generated answers; None for what their task says.
        progress: called with (what, done, total).
        maker: makes the prompts; None for plain ones.

    Raises:
        DataError: for answers that do not fit, and labels the tokenizer cannot tell apart.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = prepared.manifest
    maker = maker or PromptMaker(PromptRecipe(), manifest.tasks, encoder)
    names, splits = list(manifest.tasks), sorted(manifest.splits)
    labels = {name: encoder.label_ids(task) for name, task in manifest.tasks.items()}
    room = {
        name: max((len(ids) for ids in labels[name]), default=max_new_tokens or task.max_new_tokens)
        for name, task in manifest.tasks.items()
    }
    writer, first, num_cut, num_tokens = _Writer(folder), [0], 0, 0
    for index, user in enumerate(prepared.users()):
        count = 0
        for row, encoded in _examples(user, maker, encoder, room, train_split):
            row |= {"user": index, "task": names.index(row["task"])}
            row["split"] = splits.index(row["split"]) if row["split"] is not None else -1
            row |= {"num_prompt": encoded.num_prompt, "num_tokens": len(encoded.ids), "input_ids": encoded.ids}
            writer.add(row)
            count += 1
            num_cut += encoded.num_cut > 0
            num_tokens += len(encoded.ids)
        first.append(first[-1] + count)
        if index % 200 == 0:
            progress("tokenise", index, manifest.num_users)
    writer.close()
    progress("tokenise", manifest.num_users, manifest.num_users)
    with atomic_path(folder / "first.npy") as path, path.open("wb") as file:
        np.save(file, np.asarray(first, dtype=np.int64), allow_pickle=False)
    marker = {
        "files": writer.files,
        "tasks": names,
        "splits": splits,
        "labels": labels,
        "num_examples": first[-1],
        "num_tokens": num_tokens,
        "num_cut": num_cut,
        "num_bare": maker.num_bare,
        "max_length": encoder.max_length,
    }
    write_json_atomic(folder / MARKER, marker)


def _examples(
    user: User, maker: PromptMaker, encoder: PromptEncoder, room: dict[str, int], train_split: str
) -> Iterator[tuple[dict[str, Any], Encoded]]:
    def reserved(task: str, answer: str) -> int:
        return max(room[task], len(encoder.answer_ids(answer)))

    for position, item in enumerate(user.history):
        row = {"kind": HISTORY, "split": None, "task": item.task, "position": position, "has_answer": True}
        num = reserved(item.task, item.answer)
        yield row, encoder.encode(maker.history(user, position, num), item.answer, num)
    for position, query in enumerate(user.queries):
        row = {"kind": QUERY, "split": query.split, "task": query.task, "position": position}
        if query.split == train_split and query.answer is not None:
            num = reserved(query.task, query.answer)
            yield row | {"has_answer": True}, encoder.encode(maker.query(user, position, num), query.answer, num)
        else:
            text = maker.query(user, position, room[query.task])
            yield row | {"has_answer": False}, encoder.question(text, room[query.task])


class TokenData:
    """The tokenised examples; read by stages through indices, from mapped files of which none is loaded whole."""

    def __init__(self, folder: Path) -> None:
        self.marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        self._rows = MappedRows([folder / name for name in self.marker["files"]], self.marker["num_examples"])
        self._first = np.load(folder / "first.npy", mmap_mode="r", allow_pickle=False)

    @property
    def num_users(self) -> int:
        """Users, cold ones included."""
        return len(self._first) - 1

    @property
    def num_examples(self) -> int:
        """Examples of all users."""
        return self._rows.num_rows

    @property
    def tasks(self) -> list[str]:
        """Task names by code."""
        return list(self.marker["tasks"])

    def labels(self, task: str) -> list[list[int]]:
        """Token ids of each label of a task, end token included; empty for open answers."""
        return list(self.marker["labels"][task])

    def column(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A column (any but `input_ids`) of the examples from `start` up to `stop`.

        All of them at once take as many bytes as there are: whoever can, goes by `blocks`.
        """
        stop = self.num_examples if stop is None else stop
        if start >= stop:
            return np.empty(0, dtype=SCHEMA.field(name).type.to_pandas_dtype())
        return self._rows.column(name, start, stop)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """[start, stop) of each block of examples, in order."""
        for start in range(0, self.num_examples, EXAMPLES_PER_BLOCK):
            yield start, min(start + EXAMPLES_PER_BLOCK, self.num_examples)

    def split_code(self, split: str) -> int:
        """The number that stands for a split in the `split` column; -2, which matches none, where it is absent."""
        return self.marker["splits"].index(split) if split in self.marker["splits"] else -2

    def range_of(self, user: int) -> tuple[int, int]:
        """[start, stop) of a user's examples."""
        return int(self._first[user]), int(self._first[user + 1])

    def users_of(self, indices: np.ndarray) -> np.ndarray:
        """The user of each example; reads no example."""
        return np.searchsorted(self._first, indices, side="right") - 1

    def history_digests(self, first: int, stop: int) -> list[str]:
        """A hex digest of the tokenised history of each of the users `first` up to `stop`; "" where there is none.

        It depends on nothing but the tokens, so the same history has the same digest wherever it stands.
        """
        found = []
        for start in range(first, stop, USERS_PER_DIGEST):
            end = min(start + USERS_PER_DIGEST, stop)
            row, last = int(self._first[start]), int(self._first[end])
            parts = [batch.column("input_ids") for batch, _ in self._rows.ranges(row, last)]
            ids = pa.concat_arrays(parts) if parts else pa.array([], SCHEMA.field("input_ids").type)
            offsets, values = ids.offsets.to_numpy(), ids.values.to_numpy()
            shape = np.stack([np.diff(offsets), self.column("num_prompt", row, last)], axis=1).astype(np.int64)
            num_history = np.concatenate([[0], np.cumsum(self.column("kind", row, last) == HISTORY)])
            for user in range(start, end):
                a, b = (int(n) - row for n in self.range_of(user))
                b = a + int(num_history[b] - num_history[a])  # questions come after the history
                digest = hashlib.blake2b(shape[a:b].tobytes(), digest_size=16)
                digest.update(values[offsets[a] : offsets[b]].tobytes())
                found.append(digest.hexdigest() if b > a else "")
        return found

    def examples(self, indices: Sequence[int] | np.ndarray) -> list[Example]:
        """The examples at `indices`, in that order."""
        found: dict[int, Example] = {}
        for batch, rows, positions in self._rows.places(np.asarray(indices, dtype=np.int64)):
            found.update(zip(positions.tolist(), _made(batch, rows), strict=True))
        return [found[position] for position in range(len(indices))]

    def examples_of(self, start: int, stop: int) -> list[Example]:
        """The examples from `start` up to `stop`."""
        parts = (_made(batch, np.arange(batch.num_rows)) for batch, _ in self._rows.ranges(start, stop))
        return [example for part in parts for example in part]


def _made(batch: pa.RecordBatch, rows: np.ndarray) -> list[Example]:
    """The examples in the given rows of a record batch."""
    user, kind, task, position, num_prompt = (
        batch.column(name).to_numpy()[rows].tolist() for name in ("user", "kind", "task", "position", "num_prompt")
    )
    ids = batch.column("input_ids")
    offsets, values = ids.offsets.to_numpy(), ids.values.to_numpy()
    tokens = (values[offsets[row] : offsets[row + 1]].astype(np.int64) for row in rows)
    return [Example(*about) for about in zip(user, kind, task, position, num_prompt, tokens, strict=True)]
