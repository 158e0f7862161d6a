"""The catalog in memory: its rows as columns, and a hash of the users to find them by.

Built by the catalog when it opens; a million users are a few arrays (about 110 MB), not a million objects.
A user's rows are the versions put and the rollbacks; which one is current follows from them alone, with no clock.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from proper_ds.errors import StoreError
from proper_ds.model.lora import LoraLayout
from proper_ds.store.packs import Place

SCHEMA = pa.schema(
    [
        ("user", pa.large_string()),
        ("version", pa.int32()),
        ("status", pa.dictionary(pa.int8(), pa.string())),
        ("reason", pa.dictionary(pa.int32(), pa.string())),
        ("pack", pa.dictionary(pa.int32(), pa.string())),
        ("rank", pa.int16()),
        ("row", pa.int32()),
        ("checksum", pa.uint32()),
        ("num_items", pa.int32()),
        ("num_steps", pa.int32()),
        ("first_loss", pa.float32()),
        ("last_loss", pa.float32()),
        ("digest", pa.binary()),
        ("over", pa.int32()),
        ("turn", pa.int32()),
    ]
)
STORED, FAILED, ROLLBACK = "stored", "failed", "rollback"

_FNV_OFFSET, _FNV_PRIME, _MASK = 0xCBF29CE484222325, 0x100000001B3, 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the catalog: a version of one user's adapter, or a rollback to one.

    Attributes:
        version: the version put, or the one that a rollback makes current.
        status: `stored`; `failed` with its reason: then there is no adapter; or `rollback`.
        pack, rank, row, checksum: where the adapter lies; empty, 0, -1 and 0 where there is none.
        num_items, num_steps, first_loss, last_loss: of its training; losses are kept in float32.
        digest: hex digest of the history it was learned from, empty where it is not known.
        over: the highest version stored when a rollback was made, which it outweighs; `version` itself otherwise.
        turn: 1, 2, ... for rollbacks over the same version; 0 for versions.
    """

    user: str
    version: int
    status: str
    reason: str
    pack: str
    rank: int
    row: int
    checksum: int
    num_items: int
    num_steps: int
    first_loss: float
    last_loss: float
    digest: str
    over: int
    turn: int


def table_of(entries: Sequence[Entry]) -> pa.Table:
    """Entries as a table of SCHEMA."""
    columns: dict[str, Any] = {f.name: [getattr(entry, f.name) for entry in entries] for f in fields(Entry)}
    columns["digest"] = [bytes.fromhex(digest) for digest in columns["digest"]]
    return pa.table(columns, schema=SCHEMA)


class Index:
    """Every row of a catalog at one moment.

    Attributes:
        table: the rows, one chunk a column.
        layouts: of the stored adapters, by their JSON.
    """

    def __init__(self, table: pa.Table, layouts: dict[str, LoraLayout]) -> None:
        table = table.unify_dictionaries()
        self._columns = {name: table[name].combine_chunks() for name in SCHEMA.names}
        self.table = pa.table(self._columns)
        self.layouts = layouts
        hashes = _hashes(self._columns["user"])
        self._order = np.argsort(hashes, kind="stable").astype(np.uint32)
        self._hashes = hashes[self._order]

    @cached_property
    def _numbers(self) -> dict[str, np.ndarray]:
        """Every column but the strings as numpy: codes where it is a dictionary."""
        found = {}
        for name, column in self._columns.items():
            if name not in ("user", "digest"):
                plain = column.indices if pa.types.is_dictionary(column.type) else column
                found[name] = plain.to_numpy(zero_copy_only=True)
        return found

    @cached_property
    def _words(self) -> dict[str, list[str]]:
        return {
            name: column.dictionary.to_pylist()
            for name, column in self._columns.items()
            if pa.types.is_dictionary(column.type)
        }

    @property
    def packs(self) -> list[str]:
        """Names of packs that rows may lie in; `numbers("pack")` are places in this list."""
        return self._words["pack"]

    def numbers(self, column: str) -> np.ndarray:
        """A column by row; places in a list of words where the column holds words."""
        return self._numbers[column]

    @cached_property
    def _by_status(self) -> dict[str, np.ndarray]:
        words = self._words["status"]
        return {
            status: self._numbers["status"] == (words.index(status) if status in words else -1)
            for status in (STORED, FAILED, ROLLBACK)
        }

    def is_status(self, status: str) -> np.ndarray:
        """By row, whether it has this status."""
        return self._by_status[status]

    def user_at(self, row: int) -> str:
        """The user of a row."""
        user: str = self._columns["user"][int(row)].as_py()
        return user

    def place_at(self, row: int) -> Place:
        """Where a row's adapter lies."""
        pack = self.packs[self._numbers["pack"][row]]
        rank, number, checksum = (int(self._numbers[name][row]) for name in ("rank", "row", "checksum"))
        return Place(pack, rank, number, checksum)

    def entry_at(self, row: int) -> Entry:
        """One row."""
        values: dict[str, Any] = {name: column[row].item() for name, column in self._numbers.items()}
        for name, words in self._words.items():
            values[name] = words[values[name]]
        digest = self._columns["digest"][row].as_py().hex()
        return Entry(user=self.user_at(row), digest=digest, **values)

    def rows_of(self, user: str) -> list[int]:
        """A user's rows, oldest first."""
        key = np.uint64(_hash(user.encode()))
        begin = int(self._hashes.searchsorted(key))
        rows = []
        while begin < len(self._hashes) and self._hashes[begin] == key:
            row = int(self._order[begin])
            if self.user_at(row) == user:
                rows.append(row)
            begin += 1
        over, turn = self._numbers["over"], self._numbers["turn"]
        return sorted(rows, key=lambda row: (over[row], turn[row])) if len(rows) > 1 else rows

    def history(self, user: str) -> list[Entry]:
        """A user's versions and rollbacks, oldest first."""
        return [self.entry_at(row) for row in self.rows_of(user)]

    def current_row(self, user: str) -> int | None:
        """The row of the highest version stored, unless rolled back since; of the last failure where none is stored."""
        rows = self.rows_of(user)
        if len(rows) < 2:
            return rows[0] if rows else None
        version, over = self._numbers["version"], self._numbers["over"]
        stored = {int(version[row]): row for row in rows if self.is_status(STORED)[row]}
        if not stored:
            return rows[-1]
        highest = max(stored)
        for row in reversed(rows):
            if self.is_status(ROLLBACK)[row] and over[row] >= highest:
                return stored[int(version[row])]
        return stored[highest]

    def current(self, user: str) -> Entry | None:
        """The entry of `current_row`, or None."""
        row = self.current_row(user)
        return None if row is None else self.entry_at(row)

    def users(self) -> list[str]:
        """Users with a stored adapter, in the order of the catalog."""
        column = self._columns["user"].filter(pa.array(self.is_status(STORED)))
        found: list[str] = pc.unique(column).to_pylist()
        return found

    def has_many(self, users: pa.LargeStringArray) -> np.ndarray:
        """Mask over the given keys: whose adapter is stored; a few columns' work however many there are."""
        stored = self._columns["user"].filter(pa.array(self.is_status(STORED)))
        found: np.ndarray = pc.is_in(users, value_set=stored).to_numpy(zero_copy_only=False)
        return found

    def failures(self) -> dict[str, str]:
        """Reasons by user for those who have no adapter because training failed."""
        found = {}
        for row in np.flatnonzero(self.is_status(FAILED)).tolist():
            user = self.user_at(row)
            entry = self.current(user)
            if entry is not None and entry.status == FAILED:
                found[user] = entry.reason
        return found

    @cached_property
    def layout(self) -> LoraLayout | None:
        """The widest layout of the stored adapters, None where nothing was ever stored.

        Raises:
            StoreError: where adapters of different modules or `lora_alpha` lie in one store.
        """
        widest: LoraLayout | None = None
        for layout in self.layouts.values():
            if widest is not None and layout.with_rank(widest.r) != widest:
                raise StoreError(
                    "the store holds adapters of different modules or lora_alpha; keep them in stores of their own:"
                    f" {json.dumps(widest.to_json())} and {json.dumps(layout.to_json())}"
                )
            if widest is None or layout.r > widest.r:
                widest = layout
        return widest


def _hash(key: bytes) -> int:
    """FNV-1a, 64 bit."""
    value = _FNV_OFFSET
    for byte in key:
        value = ((value ^ byte) * _FNV_PRIME) & _MASK
    return value


def _hashes(users: pa.LargeStringArray) -> np.ndarray:
    """`_hash` of every user, a byte of all of them at a time."""
    _, offset_buffer, data_buffer = users.buffers()
    num = len(users)
    found = np.full(num, _FNV_OFFSET, np.uint64)
    if num == 0:
        return found
    offsets = np.frombuffer(offset_buffer, np.int64)[users.offset : users.offset + num + 1]
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.empty(0, np.uint8)
    starts, lengths = offsets[:-1], np.diff(offsets)
    position, active = 0, np.flatnonzero(lengths > 0)
    while len(active):
        found[active] = (found[active] ^ data[starts[active] + position]) * np.uint64(_FNV_PRIME)
        position += 1
        active = active[lengths[active] > position]
    return found
