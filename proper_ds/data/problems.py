"""Bad records: each one is counted and named by file and record; then all are refused or set aside together."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from proper_ds.data.config import NearStrictness, Strictness
from proper_ds.errors import DataError

NUM_SHOWN = 10
BAD, LEAK, NEAR = "bad", "leak", "near_duplicate"
"""Kinds of complaint that may be refused."""
NOW_HISTORY = "queries_now_history"
"""Kind of complaint, never refused: questions that a later split's history of the same user holds already."""


class BadRecord(Exception):  # noqa: N818 - a signal between reader and collector, never shown
    """Raised while reading one record that cannot be used; carries the reason."""


@dataclass(frozen=True)
class Complaint:
    """One record that cannot be used.

    Attributes:
        kind: BAD, LEAK or NEAR, which may be refused, or NOW_HISTORY.
        record: position in the file, from 1; 0 where the file as a whole is meant.
        user: whose record it is, "" where that could not be read.
    """

    kind: str
    file: str
    record: int
    id: str
    reason: str
    user: str = ""

    def __str__(self) -> str:
        """One line for people."""
        where = f"{self.file}, record {self.record}" if self.record else self.file
        named = f" (id {self.id})" if self.id else f" (user {self.user})" if self.user else ""
        return f"{where}{named}: {self.reason}"


class Complaints:
    """Collects complaints; writes every one to a file, keeps the first few in memory.

    Use as a context manager round the reading, then call `settle`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self._first: dict[str, list[Complaint]] = {}
        self._file: IO[str] | None = None

    def __enter__(self) -> Complaints:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if not self.counts:
            self.path.unlink(missing_ok=True)

    def add(self, complaint: Complaint) -> None:
        """Note one record."""
        assert self._file is not None, "open the collector first"
        self.counts[complaint.kind] += 1
        first = self._first.setdefault(complaint.kind, [])
        if len(first) < NUM_SHOWN:
            first.append(complaint)
        self._file.write(json.dumps(asdict(complaint), ensure_ascii=False) + "\n")

    def settle(self, bad: Strictness, leaks: Strictness, near: NearStrictness) -> None:
        """Raise DataError when there were complaints of a kind that is to be refused."""
        texts = []
        if self.counts[BAD] and bad == "refuse":
            texts.append(
                self._text(
                    BAD, "bad record", "Mend them, or go on without them: --skip-bad (data.bad_records=set_aside)."
                )
            )
        if self.counts[LEAK] and leaks == "refuse":
            mend = "Mend the data, or go on without these questions: --skip-leaks (data.leaks=set_aside)."
            texts.append(self._text(LEAK, "question whose answer stands in the same user's history", mend))
        if self.counts[NEAR] and near == "refuse":
            mend = "Mend the data, or go on: data.near_duplicates=set_aside (without these questions) or =allow (with)."
            texts.append(self._text(NEAR, "question with a near copy in the same user's history", mend))
        if texts:
            raise DataError("\n".join(texts))

    def _text(self, kind: str, what: str, mend: str) -> str:
        count = self.counts[kind]
        noun = what if count == 1 else what.replace("record", "records").replace("question", "questions", 1)
        lines = [f"{count} {noun}. {mend}"]
        lines += [f"  {complaint}" for complaint in self._first[kind]]
        if count > NUM_SHOWN:
            lines.append(f"  ... and {count - NUM_SHOWN} more")
        return "\n".join(lines)
