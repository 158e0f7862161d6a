"""Joins questions, gold answers and users on disk (SQLite), so that memory does not grow with their number.

`prepare.py` fills it from the readers and then walks through it user by user.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from proper_ds.data.forgotten import Forgotten
from proper_ds.data.problems import Complaint, Complaints
from proper_ds.data.records import RawGold, RawQuestion

_SCHEMA = """
CREATE TABLE golds (source INT, split TEXT, id TEXT, output TEXT, file TEXT, record INT, used INT DEFAULT 0,
                    PRIMARY KEY (source, split, id)) WITHOUT ROWID;
CREATE TABLE questions (seq INTEGER PRIMARY KEY, source INT, split TEXT, id TEXT, user TEXT, input TEXT, time TEXT,
                        gold TEXT, file TEXT, record INT, is_bare INT, UNIQUE (source, split, id));
CREATE INDEX by_user ON questions (user, seq);
CREATE TABLE profiles (seq INTEGER PRIMARY KEY, source INT, user TEXT, split TEXT, digest BLOB, items TEXT, file TEXT,
                       record INT, UNIQUE (user, source, split, digest));
CREATE TABLE users (seq INTEGER PRIMARY KEY, user TEXT UNIQUE);
CREATE TABLE seen (split TEXT, user TEXT, PRIMARY KEY (split, user)) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class StagedProfile:
    """A history as it stood in one record."""

    source: int
    split: str
    items: list[dict[str, Any]]
    file: str
    record: int


@dataclass(frozen=True)
class StagedQuestion:
    """A question with its gold answer (None where hidden)."""

    source: int
    split: str
    id: str
    input: str
    time: str
    gold: str | None
    file: str
    record: int


@dataclass(frozen=True)
class StagedUser:
    """All that was found of one user, in the order found."""

    key: str
    profiles: list[StagedProfile]
    questions: list[StagedQuestion]


class Staging:
    """The join on disk; a context manager that removes its file."""

    def __init__(
        self,
        path: Path,
        complaints: Complaints,
        max_users_per_split: int | dict[str, int] | None,
        forgotten: Forgotten | None = None,
    ) -> None:
        self._path = path
        self._forgotten = forgotten
        self._left_out: set[str] = set()
        self._complaints = complaints
        self._limit = max_users_per_split
        self._num_seen: dict[str, int] = {}
        self.splits: set[str] = set()
        """Splits of which a question was found."""
        path.unlink(missing_ok=True)
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-65536;")
        self._db.executescript(_SCHEMA)
        self._db.execute("BEGIN")

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()
        self._path.unlink(missing_ok=True)

    def seat(self, keys: Iterable[str]) -> None:
        """Give users the first places, in this order, whether the data still has them or not."""
        self._db.executemany("INSERT INTO users (user) VALUES (?)", ((key,) for key in keys))

    def is_kept_out(self, user: str) -> bool:
        """Whether a user is forgotten, and so left out; counts them."""
        if self._forgotten is None or not self._forgotten.has(user):
            return False
        self._left_out.add(user)
        return True

    @property
    def num_kept_out(self) -> int:
        """Distinct users that were left out as forgotten."""
        return len(self._left_out)

    def add_gold(self, source: int, gold: RawGold) -> None:
        """Keep one gold answer; a repeated id is a bad record."""
        try:
            self._db.execute(
                "INSERT INTO golds (source, split, id, output, file, record) VALUES (?, ?, ?, ?, ?, ?)",
                (source, gold.split, gold.id, gold.output, gold.file, gold.record),
            )
        except sqlite3.IntegrityError:
            self._complain(gold, "a second gold answer with this id")

    def add_question(self, source: int, question: RawQuestion, gold_expected: bool) -> None:
        """Keep one question and its user's history; complains of repeated ids and missing golds."""
        self.splits.add(question.split)
        gold = question.gold
        if gold_expected:
            gold = self._take_gold(source, question)
            if gold is None and not self.is_kept_out(question.user):
                self._complain(question, "a question without a gold answer in the outputs file")
                return
        if self.is_kept_out(question.user) or not self._wanted(question):
            return
        if question.has_query:
            q = question
            try:
                self._db.execute(
                    "INSERT INTO questions (source, split, id, user, input, time, gold, file, record, is_bare)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (source, q.split, q.id, q.user, q.input, q.time, gold, q.file, q.record, not q.profile),
                )
            except sqlite3.IntegrityError:
                self._complain(question, "a second question with this id")
                return
        self._db.execute("INSERT OR IGNORE INTO users (user) VALUES (?)", (question.user,))
        if question.profile:
            items = json.dumps(question.profile, ensure_ascii=False, default=str)
            digest = hashlib.blake2b(items.encode("utf-8"), digest_size=16).digest()
            self._db.execute(
                "INSERT OR IGNORE INTO profiles (source, user, split, digest, items, file, record)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (source, question.user, question.split, digest, items, question.file, question.record),
            )

    def _take_gold(self, source: int, question: RawQuestion) -> str | None:
        key = (source, question.split, question.id)
        row = self._db.execute("SELECT output FROM golds WHERE source=? AND split=? AND id=?", key).fetchone()
        if row is None:
            return None
        self._db.execute("UPDATE golds SET used=1 WHERE source=? AND split=? AND id=?", key)
        return str(row[0])

    def _wanted(self, question: RawQuestion) -> bool:
        limit = self._limit.get(question.split) if isinstance(self._limit, dict) else self._limit
        if limit is None:
            return True
        key = (question.split, question.user)
        if self._db.execute("SELECT 1 FROM seen WHERE split=? AND user=?", key).fetchone():
            return True
        if self._num_seen.get(question.split, 0) >= limit:
            return False
        self._num_seen[question.split] = self._num_seen.get(question.split, 0) + 1
        self._db.execute("INSERT INTO seen VALUES (?, ?)", key)
        return True

    def num_bare(self, source: int) -> int:
        """Questions that came without a history although others of the same user came with one."""
        found = self._db.execute(
            "SELECT COUNT(*) FROM questions q WHERE source=? AND is_bare AND EXISTS"
            " (SELECT 1 FROM profiles p WHERE p.user=q.user AND p.source=q.source)",
            (source,),
        )
        return int(found.fetchone()[0])

    def complain_of_unused_golds(self) -> None:
        """Every gold answer whose question never came is a bad record."""
        for row in self._db.execute("SELECT file, record, id FROM golds WHERE used=0 ORDER BY source, file, record"):
            self._complaints.add(Complaint("bad", row[0], row[1], row[2], "a gold answer without a question"))

    def _complain(self, record: RawQuestion | RawGold, reason: str) -> None:
        user = record.user if isinstance(record, RawQuestion) else ""
        self._complaints.add(Complaint("bad", record.file, record.record, record.id, reason, user))

    @property
    def num_users(self) -> int:
        """Distinct users found."""
        return int(self._db.execute("SELECT COUNT(*) FROM users").fetchone()[0])

    def users(self) -> Iterator[StagedUser]:
        """Users in the order in which they first appeared."""
        for (key,) in self._db.execute("SELECT user FROM users ORDER BY seq"):
            profiles = self._db.execute(
                "SELECT source, split, items, file, record FROM profiles WHERE user=? ORDER BY seq", (key,)
            )
            questions = self._db.execute(
                "SELECT source, split, id, input, time, gold, file, record FROM questions WHERE user=? ORDER BY seq",
                (key,),
            )
            yield StagedUser(
                key,
                [StagedProfile(r[0], r[1], json.loads(r[2]), r[3], r[4]) for r in profiles],
                [StagedQuestion(*row) for row in questions],
            )
