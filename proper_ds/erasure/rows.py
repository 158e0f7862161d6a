"""Taking users out of files that hold many: each is written anew without them, all or nothing, nobody else's row moves.

Every function may be called again after a crash. It returns what it took, so that the receipt can say so.
Shapes: I history items, F feature size, U users of a unit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from proper_ds.data.forgotten import tombstone
from proper_ds.data.manifest import MANIFEST, Manifest, Shard
from proper_ds.data.prepare import PROBLEMS_FILE
from proper_ds.data.records import User
from proper_ds.data.shards import SCHEMA as PREPARED
from proper_ds.data.shards import row_of
from proper_ds.data.tokens import BLANK
from proper_ds.data.tokens import SCHEMA as TOKENS
from proper_ds.files import atomic_path, digest_of_file

_TABLE = "user_table.weight"


@dataclass(frozen=True)
class Taken:
    """What was taken: rows (of whatever the kind has), files written anew or deleted, and bytes they shrank by."""

    num_rows: int = 0
    num_files: int = 0
    num_bytes: int = 0

    def __add__(self, other: Taken) -> Taken:
        return Taken(self.num_rows + other.num_rows, self.num_files + other.num_files, self.num_bytes + other.num_bytes)


def _rewritten(path: Path, num_rows: int, write: Callable[[Path], Any]) -> Taken:
    before = path.stat().st_size
    with atomic_path(path) as temporary:
        write(temporary)
    return Taken(num_rows, 1, before - path.stat().st_size)


def delete(path: Path) -> Taken:
    """Remove a file, or a folder with all that is in it."""
    if path.is_dir():
        taken = sum((delete(child) for child in sorted(path.iterdir())), Taken())
        path.rmdir()
        return taken
    size = path.stat().st_size
    path.unlink()
    return Taken(0, 1, size)


def erase_lines(path: Path, is_theirs: Callable[[str], bool]) -> Taken:
    """Leave lines out of a text file."""
    lines = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")  # JSON may hold what splitlines splits at
    lines = [line + "\n" for line in lines[:-1]] + lines[-1:]
    kept = [line for line in lines if not is_theirs(line)]
    if len(kept) == len(lines):
        return Taken()
    text = "".join(kept).encode("utf-8", "surrogateescape")

    def write(temporary: Path) -> None:
        temporary.write_bytes(text)

    return _rewritten(path, len(lines) - len(kept), write)


def erase_prepared(folder: Path, keys: Collection[str], mentions: Callable[[str], bool]) -> Taken:
    """Empty the users' rows; each keeps its place under a tombstone, so that no index moves.

    New shards come first, then the manifest that names them, then the old ones go: a reader sees one or the other.
    """
    manifest = Manifest.read(folder)
    named = {shard.file for shard in manifest.shards}
    taken = sum((delete(path) for path in folder.glob("users-*.parquet") if path.name not in named), Taken())
    shards: list[Shard] = []
    old: list[Path] = []
    lost: list[dict[str, Any]] = []
    for shard in manifest.shards:
        path = folder / shard.file
        users = pq.read_table(path, columns=["user"]).column("user").to_pylist()
        theirs = {row: shard.first + row for row, key in enumerate(users) if key in keys}
        if not theirs:
            shards.append(shard)
            continue
        fresh = folder / f"{path.name.split('.')[0]}.{_next_number(path.name)}.parquet"
        lost += _copy_without(path, fresh, theirs)
        shards.append(replace(shard, file=fresh.name, num_bytes=fresh.stat().st_size, digest=digest_of_file(fresh)))
        old.append(path)
        taken += Taken(len(theirs), 1, path.stat().st_size - fresh.stat().st_size)
    if old:
        _counted_without(replace(manifest, shards=shards), lost).write(folder)
    for path in old:
        path.unlink()
    problems = folder / PROBLEMS_FILE
    if problems.exists():
        taken += erase_lines(problems, lambda line: mentions(line) or _user_of(line) in keys)
    return taken


def _user_of(line: str) -> str | None:
    try:
        user: str | None = json.loads(line).get("user")
    except ValueError:  # cut short
        return None
    return user


def _counted_without(manifest: Manifest, lost: list[dict[str, Any]]) -> Manifest:
    """The manifest's counts without some rows, which are empty now."""
    splits = {split: dict(counts) for split, counts in manifest.splits.items()}
    for row in lost:
        for split in {query["split"] for query in row["queries"]}:
            splits[split]["num_users"] -= 1
        for query in row["queries"]:
            splits[query["split"]]["num_queries"] -= 1
    full = [row for row in lost if row["history"] or row["queries"]]
    return replace(
        manifest,
        splits=splits,
        num_cold_users=manifest.num_cold_users - sum(not row["history"] for row in full),
        num_history_items=manifest.num_history_items - sum(len(row["history"]) for row in lost),
        num_empty=manifest.num_empty + len(full),
    )


def _next_number(name: str) -> int:
    parts = name.split(".")
    return int(parts[1]) + 1 if len(parts) == 3 else 1


def _copy_without(path: Path, fresh: Path, theirs: dict[int, int]) -> list[dict[str, Any]]:
    """Copy a shard with some rows emptied, a row group at a time; returns what those rows were.

    Args:
        theirs: the users' indices by row of the shard.
    """
    lost, first = [], 0
    with (
        atomic_path(fresh) as temporary,
        pq.ParquetFile(path) as file,
        pq.ParquetWriter(temporary, PREPARED, compression="zstd") as writer,
    ):
        for number in range(file.num_row_groups):
            table = file.read_row_group(number)
            inside = {row - first: index for row, index in theirs.items() if first <= row < first + table.num_rows}
            if inside:
                rows = table.to_pylist()
                for row, index in inside.items():
                    lost.append(rows[row])
                    rows[row] = row_of(User(tombstone(index)))
                table = pa.Table.from_pylist(rows, schema=PREPARED)
            writer.write_table(table)
            first += table.num_rows
    return lost


def erase_roster(path: Path, keys: Collection[str]) -> Taken:
    """Put tombstones in the users' places on the roster."""
    table = pq.read_table(path)
    users = table.column("user").to_pylist()
    num_theirs = sum(key in keys for key in users)
    if not num_theirs:
        return Taken()
    kept = [tombstone(index) if key in keys else key for index, key in enumerate(users)]
    fresh = pa.table({"user": pa.array(kept, pa.string())}).replace_schema_metadata(table.schema.metadata)
    return _rewritten(path, num_theirs, partial(pq.write_table, fresh, compression="zstd"))


def erase_tokens(folder: Path, users: Collection[int]) -> Taken:
    """Blank the users' examples: they keep their rows and lengths, so that neither examples nor work units move."""
    taken = Taken()
    for path in sorted(folder.glob("examples-*.arrow")):
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            batches = [_blanked(batch, users) for batch in stream]
        num_rows = sum(count for _, count in batches)
        if num_rows:
            taken += _rewritten(path, num_rows, partial(_write_stream, batches))
    return taken


def _blanked(batch: pa.RecordBatch, users: Collection[int]) -> tuple[pa.RecordBatch, int]:
    columns = {name: batch.column(name) for name in batch.schema.names}
    theirs = np.isin(columns["user"].to_numpy(), list(users)) & (columns["kind"].to_numpy() != BLANK)
    if not theirs.any():
        return batch, 0
    offsets = columns["input_ids"].offsets.to_numpy()
    ids = columns["input_ids"].values.to_numpy().copy()
    for row in np.flatnonzero(theirs):
        ids[offsets[row] : offsets[row + 1]] = 0
    for name, value in (("kind", BLANK), ("split", -1)):
        column = columns[name].to_numpy().copy()
        column[theirs] = value
        columns[name] = pa.array(column, TOKENS.field(name).type)
    columns["has_answer"] = pc.and_(columns["has_answer"], pa.array(~theirs))
    columns["input_ids"] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(ids, pa.int32()))
    return pa.RecordBatch.from_arrays([columns[name] for name in TOKENS.names], schema=TOKENS), int(theirs.sum())


def _write_stream(batches: Iterable[tuple[pa.RecordBatch, int]], path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, TOKENS) as stream:
        for batch, _ in batches:
            stream.write_batch(batch)


def erase_features(folder: Path, users: Collection[int]) -> Taken:
    """Take the users' features out; to readers they are users without history."""
    taken, theirs = Taken(), np.asarray(sorted(users), np.int64)
    for path in sorted(folder.glob("unit-*.safetensors")):
        first, tensors = int(path.stem.removeprefix("unit-")), load_file(path)
        counts_U = tensors["counts"]
        inside = theirs[slice(*np.searchsorted(theirs, [first, first + len(counts_U)]))] - first
        rows = [row for row in inside.tolist() if counts_U[row]]
        if not rows:
            continue
        parts = list(tensors["items"].split(counts_U.tolist()))
        for row in rows:
            parts[row] = parts[row][:0]
            for name in ("sums", "counts", "digests"):
                tensors[name][row] = 0
        tensors["items"] = torch.cat(parts).contiguous()
        taken += _rewritten(path, len(rows), partial(save_file, tensors))
    return taken


def erase_embeddings(folder: Path, users: Collection[int]) -> Taken:
    """Take the embeddings of the users' items and questions out."""
    taken, theirs = Taken(), np.asarray(sorted(users), np.int64)
    for path in sorted(folder.glob("unit-*.safetensors")):
        first, tensors = int(path.stem.removeprefix("unit-")), load_file(path)
        counts = {"keys": tensors["num_items"], "values": tensors["num_items"], "queries": tensors["num_queries"]}
        inside = theirs[slice(*np.searchsorted(theirs, [first, first + len(counts["keys"])]))] - first
        rows = [row for row in inside.tolist() if counts["keys"][row] or counts["queries"][row]]
        if not rows:
            continue
        for name, count_U in counts.items():
            parts = list(tensors[name].split(count_U.tolist()))
            for row in rows:
                parts[row] = parts[row][:0]
            tensors[name] = torch.cat(parts).contiguous()
        tensors["num_items"][rows] = 0
        tensors["num_queries"][rows] = 0
        taken += _rewritten(path, len(rows), partial(save_file, tensors))
    return taken


def erase_predictions(folder: Path, users: Collection[int]) -> Taken:
    """Take the users' rows, answers to their questions or texts about them, out of the units' files."""
    taken = Taken()
    for path in sorted(folder.glob("units/*.parquet")):
        table = pq.read_table(path)
        theirs = pc.is_in(table.column("user"), value_set=pa.array(list(users), pa.int32()))
        num_rows = int(pc.sum(theirs).as_py() or 0)
        if num_rows:
            kept = table.filter(pc.invert(theirs))
            taken += _rewritten(path, num_rows, partial(pq.write_table, kept, compression="zstd"))
    return taken


def erase_table_lines(path: Path, users: Collection[int]) -> Taken:
    """Make the users' lines in a group level's user table those of the unknown user."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    table = tensors.get(_TABLE)
    lines = [user + 1 for user in users if table is not None and user + 1 < len(table)]
    changed = [line for line in lines if table is not None and not table[line].equal(table[0])]
    if table is None or not changed:
        return Taken()
    table[changed] = table[0].clone()
    return _rewritten(path, len(changed), partial(save_file, tensors, metadata=metadata))


def has_tables(folder: Path) -> bool:
    """Whether a group level holds a user table."""
    path = folder / "level.safetensors"
    if not path.exists():
        return False
    with safe_open(path, "pt") as file:
        return _TABLE in file.keys()  # noqa: SIM118 - no mapping


def is_prepared(folder: Path) -> bool:
    """Whether a prepared folder is complete."""
    return (folder / MANIFEST).exists()
