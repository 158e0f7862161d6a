"""Reads a prepared folder: users by index range, with only the columns that are needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from proper_ds.data.forgotten import Forgotten, tombstone
from proper_ds.data.manifest import Manifest
from proper_ds.data.records import HistoryItem, Query, User
from proper_ds.errors import DataError


class PreparedData:
    """A folder written by `data prepare`; a user's index is the row over all shards."""

    def __init__(self, folder: Path, forgotten: Forgotten | None = None) -> None:
        """Raises DataError when the manifest or a shard is missing or cut short.

        Args:
            forgotten: users whose rows are read as empty ones: for prepared data that is not the run's own.
        """
        self.folder = folder
        self._forgotten = forgotten or Forgotten("", set())
        self.manifest = Manifest.read(folder)
        for shard in self.manifest.shards:
            path = folder / shard.file
            size = path.stat().st_size if path.exists() else -1
            if size != shard.num_bytes:
                raise DataError(f"{path} has {size} bytes where its manifest says {shard.num_bytes}; prepare again")

    def users(self, start: int = 0, stop: int | None = None) -> Iterator[User]:
        """Users `start` to `stop` in order; one row group is in memory at a time."""
        stop = self.manifest.num_users if stop is None else stop
        for shard in self.manifest.shards:
            if shard.first >= stop or shard.first + shard.num_users <= start:
                continue
            with pq.ParquetFile(self.folder / shard.file) as file:
                first = shard.first
                for group in range(file.num_row_groups):
                    num_rows = file.metadata.row_group(group).num_rows
                    if first < stop and first + num_rows > start:
                        rows = file.read_row_group(group).to_pylist()
                        begin = max(0, start - first)
                        for index, row in enumerate(rows[begin : stop - first], start=first + begin):
                            yield User(tombstone(index)) if self._forgotten.has(row["user"]) else _user_of(row)
                    first += num_rows

    def keys(self) -> list[str]:
        """All user keys, by index."""
        found: list[str] = self.key_column().to_pylist()
        return found

    def key_column(self) -> pa.LargeStringArray:
        """All user keys, by index, as one column: no Python object a user."""
        tables = [pq.read_table(self.folder / shard.file, columns=["user"]) for shard in self.manifest.shards]
        chunks = [chunk.cast(pa.large_string()) for table in tables for chunk in table.column("user").chunks]
        found = pa.concat_arrays(chunks) if chunks else pa.array([], pa.large_string())
        if not len(self._forgotten):
            return found
        keys = [tombstone(n) if self._forgotten.has(key) else key for n, key in enumerate(found.to_pylist())]
        return pa.array(keys, pa.large_string())


def _user_of(row: dict) -> User:
    return User(
        row["user"],
        [HistoryItem(**item) for item in row["history"]],
        [Query(**query) for query in row["queries"]],
    )
