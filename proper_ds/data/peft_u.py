"""PEFT-U's files: what each annotator said of each text.

`{user: {"train": {id: {"text": .., "label": [..]}}, "val": .., "test": ..}}`: an annotator's training part is the
history, `val` are dev questions and `test` test questions. Nobody has questions in a split `train`: name `dev` as
data.train_split, and the shared stages learn from everybody's history.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ijson

from proper_ds.data.benchmark_files import Found
from proper_ds.data.files import BROKEN, MarkedBytes, open_bytes, stem_of
from proper_ds.data.problems import BadRecord, Complaint
from proper_ds.data.readers import Complain
from proper_ds.data.records import RawQuestion
from proper_ds.data.rows import checked_record, text_of
from proper_ds.errors import DataError

STEMS = ("user_data_no_leak", "user_data_leaked")
"""In the second, a text may be in one annotator's training part and in another's test part."""
MAX_LABELS = 100


def find(files: list[Path]) -> Found | None:
    """The file among `files`, or None. Raises DataError for both forms at once, and for endless label sets."""
    chosen = [file for file in files if stem_of(file) in STEMS]
    if not chosen:
        return None
    if len(chosen) > 1:
        raise DataError(f"{chosen[0].parent} holds PEFT-U's data twice; name one of {', '.join(map(str, chosen))}")
    labels = _labels(chosen[0])
    wording = f"Which label would this person give the text? labels: [{', '.join(labels)}] text: "
    info = {"name": chosen[0].absolute().parent.name, "labels": labels, "instruction": wording}
    return Found(((chosen[0], "dev"),), "generic", info=info)


def _users(path: Path, complain: Complain) -> Iterator[tuple[str, Any]]:
    try:
        with open_bytes(path) as file:
            yield from ijson.kvitems(MarkedBytes(file), "", use_float=True)
    except (*BROKEN, ijson.JSONError) as error:
        complain(
            Complaint("bad", str(path), 0, "", f"cannot be read to its end ({' '.join(str(error).split())[:120]})")
        )


def _labels(path: Path) -> list[str]:
    found: set[str] = set()
    for _, parts in _users(path, lambda complaint: None):
        for samples in parts.values() if isinstance(parts, dict) else ():
            found |= {_label(sample) for sample in samples.values() if isinstance(sample, dict) and sample.get("label")}
    if not found or len(found) > MAX_LABELS:
        raise DataError(f"{path} has {len(found)} different labels; this reader takes 1 to {MAX_LABELS}")
    return sorted(found)


def _label(sample: dict[str, Any]) -> str:
    """Several labels of one text are one answer, as PEFT-U scores them."""
    label = sample["label"]
    return ", ".join(str(part).strip() for part in label) if isinstance(label, list) else str(label).strip()


def read(path: Path, split: str, info: dict[str, Any], complain: Complain) -> Iterator[RawQuestion]:
    """The questions of all annotators; an annotator's history comes with the first."""
    for position, (user, parts) in enumerate(_users(path, complain), start=1):
        try:
            yield from list(_questions(user, parts, str(path), position, str(info["instruction"])))
        except BadRecord as reason:
            complain(Complaint("bad", str(path), position, user, str(reason), user))


def _questions(user: str, parts: Any, file: str, position: int, instruction: str) -> Iterator[RawQuestion]:
    parts = checked_record(parts)
    history = [{"id": key, **_pair(sample)} for key, sample in checked_record(parts.get("train", {})).items()]
    first = history
    for part, split in (("val", "dev"), ("test", "test")):
        for key, sample in checked_record(parts.get(part, {})).items():
            pair, asked = _pair(sample), f"{user}:{key}"  # annotators share texts and their ids
            text = instruction + pair["input"]
            yield RawQuestion(file, position, asked, user, split, text, first, gold=pair["output"])
            first = []
    if history and first:
        yield RawQuestion(file, position, "", user, "dev", "", history, has_query=False)


def _pair(sample: Any) -> dict[str, str]:
    sample = checked_record(sample)
    if not sample.get("label"):
        raise BadRecord("a text without a label")
    return {"input": text_of(sample, "text", "the text that was labelled"), "output": _label(sample)}
