"""The catalog on disk: which user's adapter lies where, and which work units are done.

    catalog/fragments/<unit>@<version>.arrows    one committed work unit; its creation is the commit
    catalog/rollbacks/<user's digest>-<over>-<turn>.arrows
    catalog/snapshots/<number>.arrows            everything so far, written by compact and forget; the newest counts

Each is an Arrow stream with the CRC-32 of its bytes after it, where readers of streams no longer look.
Fragments and rollbacks that the newest snapshot has taken in are ignored, so a crash before they are deleted does no
harm. Actors of the fleet commit; `AdapterStore` and the driver read.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from proper_ds.errors import BusyError, StoreError
from proper_ds.files import digest_of
from proper_ds.model.lora import LoraLayout
from proper_ds.store.files import Files, open_files
from proper_ds.store.index import SCHEMA, Entry, Index, table_of

FRAGMENTS, ROLLBACKS, SNAPSHOTS = "fragments", "rollbacks", "snapshots"
ENDING = ".arrows"
_UNIT = re.compile(r"[\w.-]+", re.ASCII)
_CHECKSUM_BYTES = 4
_MAX_TRIES = 20


@dataclass(frozen=True)
class Contents:
    """A catalog at one moment.

    Attributes:
        index: its rows.
        snapshot: number of the newest snapshot, 0 for none.
        units: (name, version) of the committed work units.
        loose_units: those of them that the snapshot has not taken in.
        rollbacks: names of the rollbacks' files.
        loose_rollbacks: those of them that the snapshot has not taken in.
    """

    index: Index
    snapshot: int
    units: frozenset[tuple[str, int]]
    loose_units: frozenset[tuple[str, int]]
    rollbacks: frozenset[str]
    loose_rollbacks: frozenset[str]


class Catalog:
    """The catalog in one folder, a local path or an fsspec URI."""

    def __init__(self, location: str | Path) -> None:
        self.files: Files = open_files(location)
        self._covered: tuple[int, set[tuple[str, int]]] = (0, set())

    def units(self, version: int = 1) -> set[str]:
        """Names of the units committed at a version."""
        return {name for name, held in self._all_units() if held == version}

    def has_unit(self, unit: str, version: int) -> bool:
        """Whether a unit is committed at a version; costs the same however many there are."""
        return self.files.exists(fragment_name(unit, version)) or self.is_in_snapshot(unit, version)

    def last_version(self) -> int:
        """The highest version of any committed unit, 0 where there is none."""
        return max((version for _, version in self._all_units()), default=0)

    def _all_units(self) -> set[tuple[str, int]]:
        fragments = {unit_of(name) for name in self.listing(FRAGMENTS)}  # before the snapshots, see `load`
        return fragments | self._units_in_snapshot()

    def has_anything(self) -> bool:
        """Whether anything was ever committed here."""
        return any(self.listing(folder) for folder in (SNAPSHOTS, FRAGMENTS))

    def listing(self, folder: str) -> dict[str, int]:
        """Bytes by name of the committed files in one of the catalog's folders."""
        return {name: size for name, size in self.files.listing(folder).items() if _is_whole(name)}

    def newest_snapshot(self) -> int:
        """The number of the newest snapshot, 0 for none."""
        return max((int(name.removesuffix(ENDING)) for name in self.listing(SNAPSHOTS)), default=0)

    def _units_in_snapshot(self) -> set[tuple[str, int]]:
        for _ in range(_MAX_TRIES):
            number = self.newest_snapshot()
            if number != self._covered[0]:
                try:
                    data = self.files.read(snapshot_name(number))
                except FileNotFoundError:
                    continue
                with _opened(data, self._where(snapshot_name(number))) as stream:
                    self._covered = (number, _pairs(stream.schema))
            return self._covered[1]
        raise BusyError(f"catalog {self.files.location} changes faster than it can be read; try again")

    def commit(self, unit: str, version: int, entries: Sequence[Entry], layout: LoraLayout | None) -> bool:
        """Commit a unit, all or nothing; False where it is committed already, and then nothing has changed."""
        assert _UNIT.fullmatch(unit) and version >= 1, "units are named in letters, digits, '.', '_' and '-'"
        metadata = {} if layout is None else {"layout": json.dumps(layout.to_json())}
        data = encoded(table_of(entries), metadata, "lz4")
        return self.files.create(fragment_name(unit, version), data)

    def is_in_snapshot(self, unit: str, version: int) -> bool:
        """Whether the newest snapshot holds a unit; a fragment of it that is written later is ignored."""
        return (unit, version) in self._units_in_snapshot()

    def commit_rollback(self, entry: Entry) -> bool:
        """Commit a rollback; False where somebody else's over the same version has the same turn."""
        name = f"{digest_of(entry.user)[:16]}-{entry.over}-{entry.turn}"
        return self.files.create(f"{ROLLBACKS}/{name}{ENDING}", encoded(table_of([entry]), {}, None))

    def load(self) -> Contents:
        """Everything committed.

        Raises:
            StoreError: where a file of the catalog is damaged.
            BusyError: where others compact it time and again.
        """
        for _ in range(_MAX_TRIES):
            # Fragments are listed before snapshots: one that a compaction deletes in between is in its snapshot.
            fragments = {unit_of(name) for name in self.listing(FRAGMENTS)}
            rollbacks = frozenset(self.listing(ROLLBACKS))
            try:
                found = self._read(self.newest_snapshot(), fragments, rollbacks)
            except FileNotFoundError:  # compacted since the listing
                continue
            pa.default_memory_pool().release_unused()  # as much again, from putting the columns together
            return found
        raise BusyError(f"catalog {self.files.location} changes faster than it can be read; try again")

    def _read(self, snapshot: int, fragments: set[tuple[str, int]], rollbacks: frozenset[str]) -> Contents:
        tables = [SCHEMA.empty_table()]
        units, merged, layouts = set[tuple[str, int]](), set[str](), set[str]()
        if snapshot:
            name = snapshot_name(snapshot)
            table = decoded(self.files.read(name), self._where(name))
            units = _pairs(table.schema)
            merged = set(json.loads(table.schema.metadata[b"rollbacks"]))
            layouts = set(json.loads(table.schema.metadata[b"layouts"]))
            tables.append(table.replace_schema_metadata(None))
        loose, loose_rollbacks = frozenset(fragments - units), rollbacks - merged
        names = [fragment_name(unit, version) for unit, version in sorted(loose, key=lambda pair: pair[::-1])]
        names += [f"{ROLLBACKS}/{name}" for name in sorted(loose_rollbacks)]
        for name, data in zip(names, self.files.read_all(names), strict=True):
            table = decoded(data, self._where(name))
            if table.schema.metadata and b"layout" in table.schema.metadata:
                layouts.add(table.schema.metadata[b"layout"].decode())
            tables.append(table.replace_schema_metadata(None))
        known = {text: LoraLayout.from_json(json.loads(text)) for text in sorted(layouts)}
        index = Index(pa.concat_tables(tables), known)
        return Contents(index, snapshot, frozenset(units) | loose, loose, rollbacks, loose_rollbacks)

    def _where(self, name: str) -> str:
        return f"{self.files.location}/{name}"


def snapshot_name(number: int) -> str:
    """The file of a snapshot."""
    return f"{SNAPSHOTS}/{number:08d}{ENDING}"


def fragment_name(unit: str, version: int) -> str:
    """The file of a unit's fragment."""
    return f"{FRAGMENTS}/{unit}@{version}{ENDING}"


def unit_of(fragment: str) -> tuple[str, int]:
    """(unit, version) of a fragment's file name."""
    unit, _, version = fragment.removesuffix(ENDING).rpartition("@")
    return unit, int(version)


def encoded(table: pa.Table, metadata: dict[str, str], compression: str | None) -> bytes:
    """A table as the bytes of a catalog file."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, table.schema.with_metadata(metadata), options=options) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data + struct.pack("<I", zlib.crc32(data))


@contextmanager
def _opened(data: bytes, where: str) -> Iterator[Any]:
    """A catalog file's stream of batches; whatever is wrong with it becomes a StoreError."""
    try:
        body = memoryview(data)[:-_CHECKSUM_BYTES]
        if len(data) <= _CHECKSUM_BYTES or struct.unpack("<I", data[-_CHECKSUM_BYTES:])[0] != zlib.crc32(body):
            raise ValueError("the checksum does not match")
        with pa.ipc.open_stream(pa.py_buffer(body)) as stream:
            if stream.schema.names != SCHEMA.names:
                raise ValueError("its columns are others")
            yield stream
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        raise StoreError(f"{where} is damaged ({error}); restore the file") from None


def decoded(data: bytes, where: str) -> pa.Table:
    """The inverse of `encoded`; `where` is for the message. Raises StoreError."""
    with _opened(data, where) as stream:
        return stream.read_all()


def snapshot_metadata(
    units: Iterable[tuple[str, int]], rollbacks: Iterable[str], layouts: Iterable[str]
) -> dict[str, str]:
    """What a snapshot says besides its rows."""
    return {
        "units": json.dumps(sorted(units)),
        "rollbacks": json.dumps(sorted(rollbacks)),
        "layouts": json.dumps(sorted(layouts)),
    }


def _pairs(schema: Any) -> set[tuple[str, int]]:
    return {(name, version) for name, version in json.loads(schema.metadata[b"units"])}


def _is_whole(name: str) -> bool:
    return name.endswith(ENDING) and not name.startswith(".")
