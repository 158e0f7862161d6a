"""The proof: every file below a folder is read, decompressed where it is compressed, and searched.

Keys are looked for as `mention_pattern` says and as whole cells of tables, short ones only in columns of users. All
other traces are looked for as bytes.
"""

from __future__ import annotations

import gzip
import mmap
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from proper_ds.store.mentions import is_long, mention_pattern

CHUNK_BYTES = 1 << 24
_TABLES = (".parquet", ".arrow", ".arrows")


@dataclass
class Scan:
    """What was read and what was found.

    Attributes:
        num_bytes: on disk.
        num_unpacked_bytes: of columns of tables and of gzip streams, decompressed, besides.
        found: (file, kind of trace) of everything that should not be there.
        not_decoded: files that are compressed but could not be decompressed: nobody knows what is in them.
    """

    num_files: int = 0
    num_bytes: int = 0
    num_unpacked_bytes: int = 0
    found: list[tuple[str, str]] = field(default_factory=list)
    not_decoded: list[str] = field(default_factory=list)


class _Sought:
    """Keys and traces, made ready once for all files."""

    def __init__(self, keys: Sequence[str], traces: dict[str, list[bytes]]) -> None:
        self.traces, self._pattern = traces, mention_pattern(keys)
        self._users, self._long = pa.array(keys, pa.string()), pa.array(filter(is_long, keys), pa.string())
        lengths = [len(key.encode()) for key in keys] + [len(trace) for found in traces.values() for trace in found]
        self.longest = max([*lengths, 1]) + 32
        """Bytes that one of them may need, with what stands around a key."""

    def in_bytes(self, data: bytes | mmap.mmap) -> set[str]:
        """Kinds found in bytes."""
        found = {kind for kind, wanted in self.traces.items() if any(data.find(trace) >= 0 for trace in wanted)}
        return found | {"key"} if self._pattern.search(data) else found

    def in_cells(self, column: str, values: pa.Array) -> set[str]:
        """Kinds found in the cells of a table's column."""
        sought = self._users if column == "user" else self._long
        found = {"key"} if pc.any(pc.is_in(values, value_set=sought.cast(values.type))).as_py() else set[str]()
        data = values.buffers()[-1]
        return found | self.in_bytes(data.to_pybytes()) if data else found


def scan(folder: Path, keys: Sequence[str], traces: dict[str, list[bytes]], others: Sequence[Path] = ()) -> Scan:
    """Search every file below `folder`.

    Args:
        traces: bytes by kind.
        others: more folders to search; what is found there is named by its whole path.
    """
    result, sought = Scan(), _Sought(keys, traces)
    for root in (folder, *others):
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.is_symlink():
                result.num_files += 1
                result.num_bytes += path.stat().st_size
                name = str(path.relative_to(folder) if root is folder else path)
                kinds = _search(path, sought)
                try:
                    for unpacked, num_bytes in _unpacked(path, sought):
                        kinds |= unpacked
                        result.num_unpacked_bytes += num_bytes
                except (pa.ArrowException, OSError, EOFError, ValueError, zlib.error):
                    result.not_decoded.append(name)
                result.found += [(name, kind) for kind in sorted(kinds)]
    return result


def _search(path: Path, sought: _Sought) -> set[str]:
    if not path.stat().st_size:
        return set()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return sought.in_bytes(mapped)


def _unpacked(path: Path, sought: _Sought) -> Iterator[tuple[set[str], int]]:
    """Kinds found in each part of a compressed file, and the part's bytes."""
    if path.suffix in _TABLES:
        for table in _tables(path):
            for name, column in zip(table.schema.names, table.columns, strict=True):
                for chunk in column.chunks:
                    for leaf in _leaves(chunk):
                        yield sought.in_cells(name, leaf), leaf.nbytes
    elif path.suffix == ".gz":
        tail = b""
        with gzip.open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield sought.in_bytes(tail + chunk), len(chunk)
                tail = (tail + chunk)[-sought.longest :]


def _tables(path: Path) -> Iterator[pa.Table]:
    """A Parquet file by row groups, an Arrow stream (tokens, catalogs of stores) by batches, each with dictionaries."""
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            for number in range(file.num_row_groups):
                yield file.read_row_group(number)
        return
    # a catalog's checksum stands after the stream's end, where its readers do not look
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
        for batch in stream:
            yield pa.Table.from_batches([batch])


def _leaves(array: pa.Array) -> Iterator[pa.Array]:
    kind = array.type
    if pa.types.is_struct(kind):
        for number in range(kind.num_fields):
            yield from _leaves(array.field(number))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield from _leaves(array.values)
    elif pa.types.is_dictionary(kind):
        yield from _leaves(array.dictionary)
    elif kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        yield array
