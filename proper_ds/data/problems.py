"""Bad records: each one is counted and named by file and record; then all are refused or set aside together."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO

from proper_ds.data.config import NearStrictness, Strictness
from proper_ds.errors import DataError

NUM_SHOWN, NUM_PLACES = 10, 3
"""Mistakes that a message tells, and records that it names of each."""
BAD, LEAK, NEAR = "bad", "leak", "near_duplicate"
"""Kinds of complaint that may be refused."""
NOW_HISTORY = "queries_now_history"
"""Kind of complaint, never refused: questions that a later split's history of the same user holds already."""
GIVE_TASK = "give data.task="
"""In the reason of a bad record that would be a good one of another task."""
_ITEM = re.compile(r"(history item \d+): ")


class RefusedError(DataError):
    """Records that cannot be used, and are not to be set aside.

    The message names the file that lists them all where it still is when the message is shown: the copy of the data
    that a check makes ends with the check.
    """

    def __init__(self, told: str, listed: Path) -> None:
        super().__init__(told, listed)
        self.told, self.listed = told, listed

    def __str__(self) -> str:
        """The first few, and where all are."""
        where = f"All of them are listed in {self.listed}."
        if not self.listed.exists():
            where = f"`proper-ds data prepare` lists all of them, in {self.listed.name} of its --out folder."
        return f"{self.told}\n{where}"


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
        return f"{self.place}: {self.mistake}"

    @property
    def place(self) -> str:
        """Where it is: file, record and history item."""
        where = f"{self.file}, record {self.record}" if self.record else self.file
        named = f" (id {self.id})" if self.id else f" (user {self.user})" if self.user else ""
        item = _ITEM.match(self.reason)
        return where + named + (f", {item[1]}" if item else "")

    @property
    def mistake(self) -> str:
        """The reason, the same for every record and history item that is wrong in the same way."""
        return _ITEM.sub("", self.reason, count=1)


@dataclass
class _Alike:
    """Complaints of the same mistake: how many, and the first of each of the first few records."""

    num: int = 0
    first: list[Complaint] = field(default_factory=list)

    def add(self, complaint: Complaint) -> None:
        """One more."""
        self.num += 1
        last = self.first[-1] if self.first else None
        is_new = last is None or (last.file, last.record) != (complaint.file, complaint.record)
        if is_new and len(self.first) < NUM_PLACES:
            self.first.append(complaint)

    def __str__(self) -> str:
        """Lines for people."""
        if self.num == 1:
            return f"  {self.first[0]}"
        more = "; .." if self.num > len(self.first) else ""
        places = "; ".join(complaint.place for complaint in self.first) + more
        return f"  {self.num} times: {self.first[0].mistake}\n    in {places}"


class Complaints:
    """Collects complaints; writes every one to a file, keeps the first few of the first few mistakes in memory.

    Use as a context manager round the reading, then call `settle`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self._alike: dict[str, dict[str, _Alike]] = {}
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
        mistakes = self._alike.setdefault(complaint.kind, {})
        if complaint.mistake in mistakes or len(mistakes) < NUM_SHOWN:
            mistakes.setdefault(complaint.mistake, _Alike()).add(complaint)
        self._file.write(json.dumps(asdict(complaint), ensure_ascii=False) + "\n")

    def settle(self, bad: Strictness, leaks: Strictness, near: NearStrictness) -> None:
        """Raise RefusedError when there were complaints of a kind that is to be refused."""
        texts = []
        if self.counts[BAD] and bad == "refuse":
            texts.append(self.bad_text())
        if self.counts[LEAK] and leaks == "refuse":
            mend = "Mend the data, or go on without these questions: --skip-leaks (data.leaks=set_aside)."
            texts.append(self._text(LEAK, "question whose answer stands in the same user's history", mend))
        if self.counts[NEAR] and near == "refuse":
            mend = "Mend the data, or go on: data.near_duplicates=set_aside (without these questions) or =allow (with)."
            texts.append(self._text(NEAR, "question with a near copy in the same user's history", mend))
        if texts:
            raise RefusedError("\n".join(texts), self.path)

    def bad_text(self, may_skip: bool = True) -> str:
        """The bad records for people, and what to do.

        Args:
            may_skip: whether to go on without them would help; it never does where all are good ones of another task.
        """
        mend = "Mend them" + (", or go on without them: --skip-bad (data.bad_records=set_aside)." if may_skip else ".")
        if all(GIVE_TASK in mistake for mistake in self._alike[BAD]):
            mend = "They look like data of another task."
        return self._text(BAD, "bad record", mend)

    def _text(self, kind: str, what: str, mend: str) -> str:
        count = self.counts[kind]
        noun = what if count == 1 else what.replace("record", "records").replace("question", "questions", 1)
        lines = [f"{count} {noun}. {mend}"]
        lines += [str(alike) for alike in self._alike[kind].values()]
        num_told = sum(alike.num for alike in self._alike[kind].values())
        if count > num_told:
            lines.append(f"  ... and {count - num_told} more")
        return "\n".join(lines)
