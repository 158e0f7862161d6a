"""Who is to be forgotten: their places in the run, and what of theirs to look for afterwards."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from proper_ds.data.forgotten import Forgotten
from proper_ds.data.manifest import MANIFEST, Manifest
from proper_ds.data.prepared import PreparedData
from proper_ds.data.records import User
from proper_ds.data.tokens import TokenData
from proper_ds.erasure.exports import read_exports
from proper_ds.errors import DataError, StoreError
from proper_ds.run_folder import RunFolder
from proper_ds.store.elsewhere import all_stores, open_store
from proper_ds.training.features import FeatureData

MIN_TEXT_BYTES, MIN_TOKENS, ROW_BYTES, NUM_OF_A_KIND = 24, 16, 64, 8
"""What is short may stand anywhere by chance, or be somebody else's too; so many traces of each kind will do."""


@dataclass
class Traces:
    """Bytes that nobody but the users has written into the run, by kind: `text`, `tokens`, `features`, `adapter`."""

    by_kind: dict[str, list[bytes]] = field(default_factory=dict)

    def add(self, kind: str, found: Sequence[bytes]) -> None:
        """Take the longest of what was found of one user."""
        longest = sorted(set(found), key=lambda trace: (-len(trace), trace))[:NUM_OF_A_KIND]
        self.by_kind.setdefault(kind, []).extend(longest)


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
    lines = []
    for key in unknown:
        near = difflib.get_close_matches(key, [*_some_keys(run)], n=1)
        lines.append(f"no user {key!r} in {run.root}" + (f"; did you mean {near[0]!r}?" if near else ""))
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
    for key, index in places.items():
        user = _row(run, index, key)
        if user is not None:
            texts = [item.text for item in user.history] + [query.input for query in user.queries]
            texts += [item.answer for item in user.history]
            traces.add("text", [text.encode() for text in texts if len(text.encode()) >= MIN_TEXT_BYTES])
        if run.stage("tokens").inputs() is not None:
            tokens = TokenData(run.stage("tokens").path)
            rows = tokens.examples_of(*tokens.range_of(index)) if index < tokens.num_users else []
            long = [row.ids.astype(np.int32).tobytes() for row in rows if len(row.ids) >= MIN_TOKENS and row.ids.any()]
            traces.add("tokens", long)
        if run.stage("features").inputs() is not None:
            features = FeatureData(run.stage("features").path)
            if features.has(index):
                rows_IF = features.items(index).contiguous().numpy()
                traces.add("features", [row.tobytes()[:ROW_BYTES] for row in rows_IF])
    for path in stores_of(run):
        store = open_store(path)
        for key in keys:
            if store.has(key):
                try:
                    row_P, _ = store.get_exact(key)
                except StoreError:  # damaged: forgetting the store's rows will say so
                    continue
                start = (len(row_P) // 2) * 4
                halves = row_P.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
                traces.add("adapter", [row_P.numpy().tobytes()[start : start + ROW_BYTES]])
                traces.add("adapter", [halves[start // 2 : start // 2 + ROW_BYTES]])
    return traces


def _row(run: RunFolder, index: int, key: str) -> User | None:
    try:
        prepared = PreparedData(run.stage("prepared").path)
    except (DataError, FileNotFoundError):
        return None
    user = next(prepared.users(index, index + 1), None)
    return user if user is not None and user.key == key else None
