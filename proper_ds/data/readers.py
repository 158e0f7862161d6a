"""Streaming readers of LaMP's published files, JSONL and Parquet; memory is one record, whatever the file's size.

`sources.py` decides which reader a path gets, those of other benchmarks are in `benchmarks.py` and use the streams of
records here; `staging.py` consumes what they yield.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import ijson
import pyarrow
import pyarrow.parquet

from proper_ds.data.files import BROKEN, MarkedBytes, open_bytes
from proper_ds.data.problems import BadRecord, Complaint
from proper_ds.data.records import RawGold, RawQuestion
from proper_ds.data.rows import lamp_gold, lamp_question, optional_text, plain_row

Complain = Callable[[Complaint], None]
Made = TypeVar("Made")


def json_records(path: Path, prefix: str, complain: Complain) -> Iterator[tuple[int, Any]]:
    """(position, value) of each element of a JSON array, from 1; a broken file ends the stream with a complaint."""
    position = 0
    try:
        with open_bytes(path) as file:
            for value in ijson.items(MarkedBytes(file), prefix, use_float=True):
                position += 1
                yield position, value
    except BROKEN as error:
        complain(Complaint("bad", str(path), 0, "", f"truncated or damaged gzip after record {position} ({error})"))
    except ijson.JSONError as error:
        text = " ".join(str(error).split())[:120]
        complain(Complaint("bad", str(path), 0, "", f"broken JSON after record {position} ({text})"))


def made(
    items: Iterator[tuple[int, Any]],
    make: Callable[[Any, str, int, str], Made],
    path: Path,
    split: str,
    complain: Complain,
) -> Iterator[Made]:
    """What `make(value, file, position, split)` makes of each record; a BadRecord is complained of and left out."""
    for position, value in items:
        try:
            yield make(value, str(path), position, split)
        except BadRecord as reason:
            known = value if isinstance(value, dict) else {}
            named, user = optional_text(known, "id"), optional_text(known, "user_id", "user", "person_id")
            complain(Complaint("bad", str(path), position, named, str(reason), user))


def made_several(
    items: Iterator[tuple[int, Any]],
    make: Callable[[Any, str, int, str], Iterator[Made]],
    path: Path,
    split: str,
    complain: Complain,
) -> Iterator[Made]:
    """The same where each record makes several, all of them or none."""
    whole = made(items, lambda *record: list(make(*record)), path, split, complain)
    for several in whole:
        yield from several


def read_lamp_questions(path: Path, split: str, complain: Complain) -> Iterator[RawQuestion]:
    """The questions of a `*_questions.json[.gz]`."""
    yield from made(json_records(path, "item", complain), lamp_question, path, split, complain)


def read_lamp_golds(path: Path, split: str, complain: Complain) -> Iterator[RawGold]:
    """The gold answers of a `*_outputs.json[.gz]`."""
    yield from made(json_records(path, "golds.item", complain), lamp_gold, path, split, complain)


def declared_task(path: Path) -> str | None:
    """The `task` of a `*_outputs.json[.gz]`, or None where it has none or cannot be read that far."""
    try:
        with open_bytes(path) as file:
            for value in ijson.items(MarkedBytes(file), "task"):
                return str(value)
    except (*BROKEN, ijson.JSONError):
        return None
    return None


def read_jsonl(path: Path, split: str | None, complain: Complain) -> Iterator[RawQuestion]:
    """The rows of a `.jsonl[.gz]`; empty lines are passed over."""
    records = jsonl_records(path, complain)
    yield from made(records, lambda v, f, p, _: plain_row(v, f, p, split), path, split or "", complain)


def jsonl_records(path: Path, complain: Complain) -> Iterator[tuple[int, Any]]:
    """(line, value) of each line that is not empty; lines that cannot be read are complained of."""
    position = 0
    try:
        with open_bytes(path) as file:
            for position, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield position, json.loads(line.decode("utf-8"))
                    except UnicodeDecodeError:
                        complain(Complaint("bad", str(path), position, "", "holds invalid UTF-8"))
                    except json.JSONDecodeError as error:
                        complain(Complaint("bad", str(path), position, "", f"is no JSON ({error})"))
    except BROKEN as error:
        complain(Complaint("bad", str(path), 0, "", f"truncated or damaged gzip after record {position} ({error})"))


def read_parquet(path: Path, split: str | None, complain: Complain) -> Iterator[RawQuestion]:
    """The rows of a Parquet file with the columns of JSONL."""
    records = parquet_records(path, complain)
    yield from made(records, lambda v, f, p, _: plain_row(v, f, p, split), path, split or "", complain)


def parquet_records(path: Path, complain: Complain) -> Iterator[tuple[int, Any]]:
    """(row, value) of each row; rows that cannot be read are complained of."""
    position = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in _rows_of(batch):
                    position += 1
                    if row is None:
                        complain(Complaint("bad", str(path), position, "", "holds invalid UTF-8"))
                    else:
                        yield position, row
    except pyarrow.ArrowException as error:
        text = " ".join(str(error).split())[:120]
        complain(Complaint("bad", str(path), 0, "", f"cannot be read after record {position} ({text})"))


def _rows_of(batch: Any) -> Iterator[dict[str, Any] | None]:
    """The rows of a record batch; None for one whose text is no UTF-8."""
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for row in range(batch.num_rows):
        try:
            yield batch.slice(row, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield None
