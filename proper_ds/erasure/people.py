"""Who is to be forgotten: their places in the run, and what of theirs to look for afterwards."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from proper_ds.data.forgotten import Forgotten
from proper_ds.data.manifest import MANIFEST, Manifest
from proper_ds.data.prepared import PreparedData
from proper_ds.data.records import User
from proper_ds.data.tokens import TokenData
from proper_ds.erasure.exports import read_exports
from proper_ds.errors import DataError, StoreError
from proper_ds.run_folder import RunFolder
from proper_ds.store.codec import decode, record_bytes
from proper_ds.store.elsewhere import all_stores, open_store
from proper_ds.store.index import STORED
from proper_ds.store.packs import PackHeader, read_header, read_unchecked
from proper_ds.store.store import AdapterStore
from proper_ds.training.embeddings import EmbeddingData
from proper_ds.training.features import FeatureData

MIN_TEXT_BYTES, MIN_TOKENS, ROW_BYTES, NUM_OF_A_KIND = 24, 16, 64, 8
"""What is short may stand anywhere by chance, or be somebody else's too; so many traces of each kind will do."""
MAX_SOUGHT = 2_000
"""Traces of a kind over all users: every file is searched for each of them."""
MIN_DISTINCT = 8
"""Different bytes in a stretch of an adapter, for it not to be zeros or padding."""
MAX_TOLD = 20


class Traces:
    """Bytes that nobody but the users has written into the run, by kind: `text`, `tokens`, `adapter` and so on.

    Attributes:
        by_kind: those to look for, no more than MAX_SOUGHT of a kind.
        num_found: of all that were found.
    """

    def __init__(self) -> None:
        self.by_kind: dict[str, list[bytes]] = {}
        self.num_found: dict[str, int] = {}
        self._by_owner: dict[str, list[list[bytes]]] = {}

    def add(self, kind: str, found: Sequence[bytes]) -> None:
        """Take the longest of what was found of one user, or of one adapter."""
        longest = sorted(set(found), key=lambda trace: (-len(trace), trace))
        self.num_found[kind] = self.num_found.get(kind, 0) + len(longest)
        self._by_owner.setdefault(kind, []).append(longest[:NUM_OF_A_KIND])

    def choose(self) -> None:
        """Fill `by_kind`: one of everybody before the second of anybody, evenly over all where it is too many."""
        for kind, owners in self._by_owner.items():
            chosen = list[bytes]()
            for turn in range(NUM_OF_A_KIND):
                held, room = [own[turn] for own in owners if turn < len(own)], MAX_SOUGHT - len(chosen)
                chosen += [held[n * len(held) // room] for n in range(room)] if len(held) > room else held
            self.by_kind[kind] = chosen


def places_of(run: RunFolder, keys: Sequence[str], prepared: Path) -> dict[str, int]:
    """The index of each user that has one: a row of the prepared data, or a place on the roster."""
    if (prepared / MANIFEST).exists():
        shards = [prepared / shard.file for shard in Manifest.read(prepared).shards]
    else:
        shards = [run.roster] if run.roster.exists() else []
    columns = (pq.read_table(shard, columns=["user"]).column("user").to_pylist() for shard in shards)
    wanted = set(keys)
    return {key: index for index, key in enumerate(key for column in columns for key in column) if key in wanted}


def stores_of(run: RunFolder) -> list[Path | str]:
    """Every adapter store of a run, for `open_store`: those moved aside and those outside of its folder included."""
    return all_stores(run.root)


def check_known(run: RunFolder, keys: Sequence[str], places: dict[str, int], forgotten: Forgotten) -> None:
    """Raise StoreError for users of whom the run has nothing, suggesting whom they may be."""
    stores = [open_store(path) for path in stores_of(run)]
    exported = {export.user for export in read_exports(run.root)}
    aside = _keys_aside(run)
    unknown = [
        key
        for key in keys
        if key not in places
        and key not in exported
        and key not in aside
        and not forgotten.has(key)
        and not any(store.history(key) for store in stores)
    ]
    if not unknown:
        return
    lines, known = list[str](), [*_some_keys(run)]
    for key in unknown[:MAX_TOLD]:
        near = difflib.get_close_matches(key, known, n=1)
        lines.append(f"no user {key!r} in {run.root}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if len(unknown) > MAX_TOLD:
        lines.append(f"and {len(unknown) - MAX_TOLD:,} more")
    raise StoreError("\n".join([*lines, "nobody was forgotten; keys are those of the data"]))


def _keys_aside(run: RunFolder) -> set[str]:
    found: set[str] = set()
    for folder in run.superseded("prepared"):
        for shard in folder.glob("users-*.parquet"):
            found |= set(pq.read_table(shard, columns=["user"]).column("user").to_pylist())
    return found


def _some_keys(run: RunFolder, limit: int = 100_000) -> Iterator[str]:
    for shard in sorted(run.root.glob("prepared/users-*.parquet")):
        for key in pq.read_table(shard, columns=["user"]).column("user").to_pylist():
            yield key
            limit -= 1
            if not limit:
                return


def traces_of(run: RunFolder, places: dict[str, int], keys: Sequence[str]) -> Traces:
    """What to look for once it should be gone. Takes what is there: a run may have stopped at any stage."""
    traces = Traces()
    for user in _rows(run, places):
        texts = [item.text for item in user.history] + [query.input for query in user.queries]
        texts += [item.answer for item in user.history]
        traces.add("text", [text.encode() for text in texts if len(text.encode()) >= MIN_TEXT_BYTES])
    for place in (place for place in run.in_all_lanes("tokens") if place.inputs() is not None):
        tokens = TokenData(place.path)
        for index in places.values():
            rows = tokens.examples_of(*tokens.range_of(index)) if index < tokens.num_users else []
            long = [row.ids.astype(np.int32).tobytes() for row in rows if len(row.ids) >= MIN_TOKENS and row.ids.any()]
            traces.add("tokens", long)
    for place in (place for place in run.in_all_lanes("features") if place.inputs() is not None):
        features = FeatureData(place.path)
        for index in places.values():
            if features.has(index):
                rows_IF = features.items(index).contiguous().numpy()
                traces.add("features", [row.tobytes()[:ROW_BYTES] for row in rows_IF])
    for place in (place for place in run.in_all_lanes("embeddings") if place.inputs() is not None):
        embeddings = EmbeddingData(place.path)
        for own in (embeddings.user(index) for index in places.values() if embeddings.has(index)):
            parts = (own.keys_IE, own.values_IE, own.queries_QE)
            traces.add("embeddings", [row.tobytes()[:ROW_BYTES] for part in parts for row in part.numpy()])
    for path in stores_of(run):
        for found in _adapters(open_store(path), keys):
            traces.add("adapter", found)
    traces.choose()
    return traces


def _rows(run: RunFolder, places: dict[str, int]) -> Iterator[User]:
    """The users' prepared rows, as far as they are there; every row group is read once at most."""
    try:
        prepared = PreparedData(run.stage("prepared").path)
    except (DataError, FileNotFoundError):
        return
    wanted = np.asarray(sorted(places.values()), np.int64)
    for shard in prepared.manifest.shards:
        inside = wanted[slice(*np.searchsorted(wanted, [shard.first, shard.first + shard.num_users]))]
        if len(inside):
            users = prepared.users(int(inside[0]), int(inside[-1]) + 1)
            yield from (user for user in users if user.key in places)


def _adapters(store: AdapterStore, keys: Sequence[str]) -> Iterator[list[bytes]]:
    """For each stored version of the users' adapters a stretch of its bytes as stored, and of its numbers in fp32."""
    index, headers = store.catalog.load().index, dict[str, PackHeader]()
    stored = index.is_status(STORED)
    for row in (row for key in keys for row in index.rows_of(key) if stored[row]):
        place = index.place_at(row)
        try:
            if place.pack not in headers:
                headers[place.pack] = read_header(store.files, place.pack)
            header = headers[place.pack]
            record = read_unchecked(store.files, [(header, place)])
        except (StoreError, FileNotFoundError):  # no bytes to look for
            continue
        own = header.layout.with_rank(place.rank)
        num_value_bytes, _ = record_bytes(own, header.dtype)  # the scales lie elsewhere in the pack
        stretches = [_stretch(record[0, :num_value_bytes].tobytes())]
        stretches.append(_stretch(decode(record, own, header.dtype).numpy().tobytes()))
        yield [stretch for stretch in stretches if len(set(stretch)) >= MIN_DISTINCT]


def _stretch(data: bytes) -> bytes:
    """Some bytes out of an adapter, from where they differ most."""
    starts = range(0, max(1, len(data) - ROW_BYTES + 1), max(ROW_BYTES, len(data) // 64 // 4 * 4))
    return max((data[start : start + ROW_BYTES] for start in starts), key=lambda stretch: len(set(stretch)))
