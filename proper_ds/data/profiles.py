"""Profile texts that were made elsewhere: read from a person's file, or from what `training/profiles.py` wrote.

They are one text a user (and task), made from the whole history, as OPPU has them: a training prompt of a history item
knows by its profile of items after it. The built-in profile does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from proper_ds.data.recipe import PromptRecipe
from proper_ds.data.records import User
from proper_ds.errors import DataError
from proper_ds.files import atomic_path

SCHEMA = pa.schema([("user", pa.int32()), ("task", pa.string()), ("text", pa.string())])
_ALL_TASKS = ""


class Profiles:
    """Texts by user, and by task where each has its own."""

    def __init__(self, texts: dict[tuple[str, str], str]) -> None:
        """Takes texts by (user key, task); a task of "" stands for all."""
        self._texts = texts

    def of(self, user: str, task: str) -> str | None:
        """The user's text for a task, or None where there is none."""
        return self._texts.get((user, task), self._texts.get((user, _ALL_TASKS)))

    @classmethod
    def from_file(cls, path: Path) -> Profiles:
        """A JSON `{user: text}` or JSONL rows of `user` and `profile`. Raises DataError for anything else."""
        texts: dict[tuple[str, str], str] = {}
        for user, text in _jsonl_rows(path) if path.suffix == ".jsonl" else _json_pairs(path):
            if not isinstance(text, str):
                raise DataError(f"profile_file {path}: the profile of {user!r} is {str(text)[:40]!r}, not a text")
            if (user, _ALL_TASKS) in texts:
                raise DataError(f"profile_file {path}: user {user!r} has two profiles; keep one")
            texts[user, _ALL_TASKS] = " ".join(text.split())
        return cls(texts)

    @classmethod
    def from_units(cls, folder: Path, keys: Sequence[str]) -> Profiles:
        """What a model wrote, from all units' files.

        Args:
            keys: user keys by index.
        """
        texts = {}
        for path in sorted(folder.glob("*.parquet")):
            for row in pq.read_table(path).to_pylist():
                texts[keys[row["user"]], row["task"]] = row["text"]
        return cls(texts)

    def check(self, recipe: PromptRecipe, users: Iterable[User]) -> None:
        """Raises DataError with the number of users who have history and no text, unless the recipe says what then."""
        if recipe.profile == "file" and recipe.profile_missing != "refuse":
            return
        num_users, missing = 0, []
        for user in users:
            num_users += bool(user.history)
            if any(self.of(user.key, task) is None for task in {item.task for item in user.history}):
                missing.append(user.key)
        if missing:
            shown = ", ".join(repr(key) for key in missing[:3]) + (", ..." if len(missing) > 3 else "")
            mend = "add theirs, or set profile_missing to `built-in` or `empty`"
            if recipe.profile == "model":
                mend = "the profiles stage was not done for this data; run it again"
            raise DataError(
                f"{len(missing)} of {num_users} users with history have no profile in"
                f" {recipe.profile_file or 'what the model wrote'} ({shown}): {mend}"
            )


def write_unit(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Commit the texts of one work unit's users: rows of `user` (index), `task`, `text`."""
    with atomic_path(unit_path(folder, name)) as path:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, compression="zstd")


def unit_path(folder: Path, name: str) -> Path:
    """Where a unit is committed."""
    return folder / f"{name}.parquet"


def _json_pairs(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
    except ValueError as error:
        raise DataError(f"profile_file {path} is no JSON ({error}); rows go into a file named .jsonl") from None
    if not isinstance(raw, list) or not all(isinstance(pair, tuple) for pair in raw):
        raise DataError(
            f"profile_file {path} must hold {{user: text}}; a list says nothing of whose text is which. Name the users,"
            ' or write JSONL rows {"user": ..., "profile": ...}'
        )
    yield from raw


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                yield str(row["user"]), row["profile"]
            except (ValueError, KeyError, TypeError):
                raise DataError(f'profile_file {path}: row {number} is no {{"user": ..., "profile": ...}}') from None
