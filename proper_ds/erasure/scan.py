"""The proof: every file below a folder is read, decompressed where it is compressed, and searched.

Keys are looked for as whole words and as whole cells of tables; a short one, which may be any number or label, only
where it is said to be a user. All other traces are looked for as bytes.
"""

from __future__ import annotations

import gzip
import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

LONG_KEY_BYTES = 6
CHUNK_BYTES = 1 << 24


@dataclass
class Scan:
    """What was read and what was found.

    Attributes:
        num_bytes: on disk.
        num_unpacked_bytes: of Parquet columns and gzip streams, decompressed, besides.
        found: (file, kind of trace) of everything that should not be there.
    """

    num_files: int = 0
    num_bytes: int = 0
    num_unpacked_bytes: int = 0
    found: list[tuple[str, str]] = field(default_factory=list)


def is_long(key: str) -> bool:
    """Whether a key is long enough not to be found by chance."""
    return len(key.encode("utf-8", "surrogatepass")) >= LONG_KEY_BYTES


def mention_pattern(keys: Sequence[str]) -> re.Pattern[bytes]:
    """Matches where a text speaks of one of the users: see the module's docstring. Without users it matches nothing."""
    either = [] if keys else [b"(?!)"]
    for key in keys:
        word = re.escape(key.encode("utf-8", "surrogatepass"))
        if is_long(key):
            either.append(rb"(?<![0-9A-Za-z_])" + word + rb"(?![0-9A-Za-z_])")
        else:
            either.append(rb"user[\"']?:? ?[\"']" + word + rb"[\"']")
    return re.compile(b"|".join(either))


def scan(folder: Path, keys: Sequence[str], traces: dict[str, list[bytes]], others: Sequence[Path] = ()) -> Scan:
    """Search every file below `folder`.

    Args:
        traces: bytes by kind.
        others: more folders to search; what is found there is named by its whole path.
    """
    result = Scan()
    for root in (folder, *others):
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.is_symlink():
                result.num_files += 1
                result.num_bytes += path.stat().st_size
                name = str(path.relative_to(folder) if root is folder else path)
                result.found += [(name, kind) for kind in _search(path, keys, traces, result)]
    return result


def _search(path: Path, keys: Sequence[str], traces: dict[str, list[bytes]], result: Scan) -> list[str]:
    kinds, pattern = set[str](), mention_pattern(keys)
    if path.stat().st_size:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            kinds |= _in_bytes(mapped, pattern, traces)
    if path.suffix == ".parquet":
        for column, values in _cells(path):
            result.num_unpacked_bytes += values.nbytes
            searched = [key for key in keys if is_long(key) or column == "user"]
            if pc.any(pc.is_in(values, value_set=pa.array(searched, pa.string()).cast(values.type))).as_py():
                kinds.add("key")
            for buffer in values.buffers()[-1:]:
                kinds |= _in_bytes(buffer.to_pybytes(), pattern, traces) if buffer else set()
    if path.suffix == ".gz":
        kinds |= _in_gzip(path, keys, traces, result)
    return sorted(kinds)


def _in_bytes(data: bytes | mmap.mmap, pattern: re.Pattern[bytes], traces: dict[str, list[bytes]]) -> set[str]:
    found = {kind for kind, wanted in traces.items() if any(data.find(trace) >= 0 for trace in wanted)}
    if pattern.search(data):
        found.add("key")
    return found


def _in_gzip(path: Path, keys: Sequence[str], traces: dict[str, list[bytes]], result: Scan) -> set[str]:
    longest = max([len(key.encode()) for key in keys] + [len(t) for found in traces.values() for t in found] + [1]) + 1
    pattern, found, tail = mention_pattern(keys), set[str](), b""
    with gzip.open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            result.num_unpacked_bytes += len(chunk)
            found |= _in_bytes(tail + chunk, pattern, traces)
            tail = (tail + chunk)[-longest:]
    return found


def _cells(path: Path) -> Iterator[tuple[str, pa.Array]]:
    """(column, text or binary leaf) of a Parquet file, decompressed, a row group at a time."""
    with pq.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            table = file.read_row_group(number)
            for name, column in zip(table.schema.names, table.columns, strict=True):
                for chunk in column.chunks:
                    for leaf in _leaves(chunk):
                        yield name, leaf


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
