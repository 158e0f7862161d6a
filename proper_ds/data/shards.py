"""Writes users into Parquet shards, one row a user; only one row group is held in memory."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from proper_ds.data.manifest import Shard
from proper_ds.data.records import User
from proper_ds.files import digest_of_file

ROW_GROUP_USERS = 256

_ITEM = pa.struct(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("prompt", pa.int8()),
        ("text", pa.string()),
        ("answer", pa.string()),
        ("time", pa.string()),
        ("retrieval", pa.string()),
    ]
)
_QUERY = pa.struct(
    [
        ("id", pa.string()),
        ("split", pa.string()),
        ("task", pa.string()),
        ("input", pa.string()),
        ("answer", pa.string()),
        ("time", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("num_history", pa.int32()),
        ("splits", pa.list_(pa.string())),
        ("history", pa.list_(_ITEM)),
        ("queries", pa.list_(_QUERY)),
    ]
)


def row_of(user: User) -> dict[str, object]:
    """A user as a Parquet row."""
    return {
        "user": user.key,
        "num_history": len(user.history),
        "splits": sorted({query.split for query in user.queries}),
        "history": [{name: getattr(item, name) for name in item.__slots__} for item in user.history],
        "queries": [{name: getattr(query, name) for name in query.__slots__} for query in user.queries],
    }


class ShardWriter:
    """Cuts a stream of users into shards of `num_users_per_shard`; a context manager."""

    def __init__(self, folder: Path, num_users_per_shard: int) -> None:
        self._folder = folder
        self._limit = num_users_per_shard
        self._rows: list[dict[str, object]] = []
        self._writer: pq.ParquetWriter | None = None
        self._path: Path | None = None
        self._in_shard = 0
        self._total = 0
        self.shards: list[Shard] = []

    def __enter__(self) -> ShardWriter:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._close_shard()
        elif self._writer is not None:
            self._writer.close()

    def write(self, user: User) -> None:
        """Append one user."""
        self._rows.append(row_of(user))
        if len(self._rows) >= ROW_GROUP_USERS or self._in_shard + len(self._rows) >= self._limit:
            self._flush()
        if self._in_shard >= self._limit:
            self._close_shard()

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self._path = self._folder / f"users-{len(self.shards):05d}.parquet"
            self._writer = pq.ParquetWriter(self._path, SCHEMA, compression="zstd")
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA))
        self._in_shard += len(self._rows)
        self._rows = []

    def _close_shard(self) -> None:
        self._flush()
        if self._writer is None or self._path is None:
            return
        self._writer.close()
        size = self._path.stat().st_size
        self.shards.append(Shard(self._path.name, self._total, self._in_shard, size, digest_of_file(self._path)))
        self._total += self._in_shard
        self._in_shard, self._writer = 0, None
