"""Reads answers in LaMP's own files, predictions and golds alike, whoever made them; `score_files.py` scores them.

A file is `{"task": "LaMP_3", "golds": [{"id": ..., "output": ...}]}`, plain or gzip. Several tasks come as a folder of
such files or as the zip that LaMP's leaderboard takes; files are told apart by their `task`, not by their names.
"""

from __future__ import annotations

import gzip
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proper_ds.errors import DataError

NUM_SHOWN = 5
FORM = '{"task": "LaMP_3", "golds": [{"id": "310", "output": "4"}, ...]}'
"""What a file of answers looks like, for messages."""


@dataclass(frozen=True)
class AnswerFile:
    """One task's answers.

    Attributes:
        source: where they were read, for messages.
        path: the file on disk: a zip where they came in one.
        task: as the file names it, which may be a name that is not known here; None where it names none.
        answers: by question id, white space at the ends kept.
    """

    source: str
    path: Path
    task: str | None
    answers: dict[str, str]


def read_answers(path: Path) -> list[AnswerFile]:
    """The answers in a file, a zip, or a folder of files.

    Raises:
        DataError: for what cannot be read or is not in LaMP's form, and for an id that comes twice.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; give a file of LaMP's form, a folder or a zip of such files: {FORM}")
    if path.is_dir():
        texts = [(str(file), file, _unpacked(file)) for file in sorted(path.iterdir()) if _is_json(file.name)]
        found = [_parsed(*text) for text in texts if b'"golds"' in text[2]]  # questions and info.json may lie beside
    elif path.suffix == ".zip":
        found = [_parsed(f"{path}:{name}", path, text) for name, text in _zipped(path)]
    else:
        found = [_parsed(str(path), path, _unpacked(path))]
    if not found:
        raise DataError(f"{path} holds no answers; give files *.json[.gz] of LaMP's form of outputs: {FORM}")
    return found


def _is_json(name: str) -> bool:
    return name.endswith((".json", ".json.gz"))


def _unpacked(path: Path) -> bytes:
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read()
        return path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); give a whole JSON file, plain or gzip") from None


def _zipped(path: Path) -> list[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(path) as file:
            return [(name, file.read(name)) for name in sorted(file.namelist()) if name.endswith(".json")]
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path} cannot be read as a zip ({error})") from None


def _parsed(source: str, path: Path, text: bytes) -> AnswerFile:
    if not text.strip():
        raise DataError(f"{source} is empty; LaMP's form of outputs is needed: {FORM}")
    try:
        whole = json.loads(text)
    except ValueError as error:
        is_lines = _is_json_text(text.strip().splitlines()[0])
        what = "holds lines of JSON" if is_lines else f"is no JSON ({str(error)[:100]})"
        raise DataError(f"{source} {what}; LaMP's form of outputs is needed, one object a file: {FORM}") from None
    golds = whole.get("golds") if isinstance(whole, dict) else None
    if not isinstance(golds, list) or not isinstance(whole.get("task") or "", str):
        raise DataError(f"{source} is not in LaMP's form of outputs: {FORM}")
    answers: dict[str, str] = {}
    repeated: list[str] = []
    for position, record in enumerate(golds, start=1):
        if not isinstance(record, dict) or not _is_text(record.get("id")) or not _is_text(record.get("output")):
            raise DataError(f"{source}: entry {position} of `golds` needs a text or number as `id` and as `output`")
        key = str(record["id"])
        if key in answers:
            repeated.append(key)
        answers[key] = str(record["output"])
    if repeated:
        raise DataError(f"{source}: {_named(repeated, 'id')} more than once; keep one answer for each question")
    return AnswerFile(source, path, whole.get("task") or None, answers)


def _is_json_text(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _is_text(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _named(ids: list[str], what: str) -> str:
    shown = ", ".join(repr(key) for key in ids[:NUM_SHOWN]) + (" .." if len(ids) > NUM_SHOWN else "")
    return f"{len(ids)} {what}{'s' if len(ids) > 1 else ''} ({shown})"


def check_same_ids(given: AnswerFile, golds: AnswerFile) -> None:
    """LaMP scores only answers to exactly the questions that have golds. Raises DataError that names the others."""
    missing = [key for key in golds.answers if key not in given.answers]
    extra = [key for key in given.answers if key not in golds.answers]
    parts = []
    if missing:
        parts.append(f"{_named(missing, 'question')} of {golds.source} without an answer")
    if extra:
        parts.append(f"{_named(extra, 'answer')} to no question of it")
    if parts:
        raise DataError(f"{given.source}: {' and '.join(parts)}. LaMP wants one answer for every gold, and no others.")
