"""What the readers of other benchmarks' files share: what was found, and rows in whichever container they come."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from proper_ds.data.files import BROKEN, open_bytes, stem_of
from proper_ds.data.readers import Complain, json_records, jsonl_records, parquet_records

SPLITS = {"train": "train", "val": "dev", "validation": "dev", "dev": "dev", "test": "test"}
"""Splits as benchmarks call them, and as they are called here."""
_ROWS = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz")


@dataclass(frozen=True)
class Found:
    """A benchmark's files: as in `sources.Source`.

    Attributes:
        info: what a folder's own info.json may overrule.
    """

    questions: tuple[tuple[Path, str], ...]
    task: str
    golds: tuple[tuple[Path, str], ...] = ()
    info: dict[str, Any] = field(default_factory=dict)


def row_files(files: list[Path]) -> list[tuple[Path, str]]:
    """Files that may hold rows, with the split they are named after (`val-00000-of-00001.parquet`), else train."""
    found = []
    for file in files:
        stem = stem_of(file)
        if file.name.endswith(_ROWS) and stem != "info" and not stem.endswith(("_questions", "_outputs")):
            word = re.split(r"[-._]", stem, maxsplit=1)[0]
            found.append((file, SPLITS.get(word, "train")))
    return found


def rows_of(path: Path, complain: Complain) -> Iterator[tuple[int, Any]]:
    """(position, row) of a Parquet file, a JSON array or lines of JSON."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        return parquet_records(path, complain)
    return jsonl_records(path, complain) if name.endswith(".jsonl") else json_records(path, "item", complain)


def columns_of(path: Path) -> frozenset[str]:
    """The columns of a file's first row; none where it cannot be read, which its reader will say."""
    if path.suffix == ".parquet":
        try:
            return frozenset(pyarrow.parquet.read_schema(path).names)
        except (pyarrow.ArrowException, OSError):
            return frozenset()
    if path.name.removesuffix(".gz").endswith(".json") and not _is_array(path):
        return frozenset()
    for _, row in rows_of(path, lambda complaint: None):
        return frozenset(row) if isinstance(row, dict) else frozenset()
    return frozenset()


def _is_array(path: Path) -> bool:
    try:
        with open_bytes(path) as file:
            return file.read(64).lstrip()[:1] == b"["
    except BROKEN:
        return False
