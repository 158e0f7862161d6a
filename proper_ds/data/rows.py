"""One raw record to one RawQuestion or RawGold: the checks that all readers share. Raises BadRecord."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proper_ds.data.files import has_bad_text, stem_of
from proper_ds.data.problems import BadRecord
from proper_ds.data.records import RawGold, RawQuestion


def text_of(record: Mapping[str, Any], key: str, what: str) -> str:
    """A required, non-empty text or number as text."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        state = "is missing" if value is None else f"is {str(value)[:40]!r}, not a text"
        raise BadRecord(f"`{key}` {state}: {what}")
    return number_text(value)


def number_text(value: str | float) -> str:
    """Numbers as people write them: 4.0 is `4`."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def optional_text(record: Mapping[str, Any], *keys: str) -> str:
    """The first of `keys` that is given, as text, else ""."""
    for key in keys:
        value = record.get(key)
        if value is not None and str(value).strip():
            return number_text(value) if isinstance(value, int | float | str) else str(value)
    return ""


def history_of(value: Any, key: str) -> list[dict[str, Any]]:
    """A list of dictionaries, or BadRecord."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRecord(f"`{key}` is no list")
    for position, item in enumerate(value, start=1):
        if not isinstance(item, dict):
            raise BadRecord(f"`{key}` item {position} is {str(item)[:40]!r}, not an object")
    return value


def checked_record(record: Any) -> dict[str, Any]:
    """A dictionary whose texts are all valid UTF-8, or BadRecord."""
    if not isinstance(record, dict):
        raise BadRecord(f"is {str(record)[:40]!r}, not an object")
    if has_bad_text(record):
        raise BadRecord("holds invalid UTF-8")
    return record


def lamp_question(record: Any, file: str, position: int, split: str) -> RawQuestion:
    """A record of `*_questions.json`: `id`, `input`, `profile`, and in some splits `user_id` and `date`."""
    record = checked_record(record)
    folder = Path(file).absolute().parent.name
    key = text_of(record, "id", "every question needs an id that its gold answer repeats")
    user = optional_text(record, "user_id", "user")
    return RawQuestion(
        file,
        position,
        key,
        user or f"{folder}:{split}:{key}",  # LaMP's user-based split has one question a user and no name for the user
        split,
        text_of(record, "input", "the question's text"),
        history_of(record.get("profile"), "profile"),
        optional_text(record, "date", "time"),
    )


def lamp_gold(record: Any, file: str, position: int, split: str) -> RawGold:
    """A record of `golds` in `*_outputs.json`: `id` and `output`."""
    record = checked_record(record)
    key = text_of(record, "id", "every gold answer needs the id of its question")
    return RawGold(file, position, key, split, text_of(record, "output", "the gold answer"))


def plain_row(record: Any, file: str, position: int, split: str | None) -> RawQuestion:
    """A row of JSONL or Parquet: `user`, `history`, `query`, `answer`, optional `time`, `id` and `split`."""
    record = checked_record(record)
    user = text_of(record, "user", "every row needs its user")
    history = history_of(record.get("history"), "history")
    query = optional_text(record, "query")
    answer = optional_text(record, "answer")
    if not query and answer:
        raise BadRecord("an `answer` without a `query`")
    if not query and not history:
        raise BadRecord("neither `query` nor `history`")
    row_split = optional_text(record, "split") or split
    if row_split is None:
        raise BadRecord(
            "of no split: name the file after one (train.jsonl, dev-part2.jsonl), or give each row a `split`"
        )
    return RawQuestion(
        file,
        position,
        optional_text(record, "id") or f"{stem_of(Path(file))}-{position}",
        user,
        row_split,
        query,
        history,
        optional_text(record, "time", "date"),
        answer or None,
        bool(query),
    )
