"""What is done to a store as a whole: compact, forget, verify, stats. `AdapterStore` calls it.

compact and forget write new packs, then one new snapshot of the catalog, and only then delete what it replaces. The
snapshot's creation is the commit: before it the store reads as it was, after it as it shall be, and what a crash leaves
undeleted the next compact or forget deletes. Two at once cannot both commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from proper_ds.errors import StoreError
from proper_ds.store.catalog import (
    FRAGMENTS,
    ROLLBACKS,
    SNAPSHOTS,
    Catalog,
    Contents,
    encoded,
    snapshot_metadata,
    snapshot_name,
    unit_of,
)
from proper_ds.store.codec import record_bytes
from proper_ds.store.files import Files
from proper_ds.store.index import STORED, Index
from proper_ds.store.neighbours import AsFound, damaged, without_mentions
from proper_ds.store.packs import CHUNK_BYTES, FOLDER, number_of_pack, read_header, read_records, unit_of_pack
from proper_ds.store.rewrite import packs_to_merge, rewrite


@dataclass(frozen=True)
class CompactReport:
    """Files and bytes of the store before and after."""

    num_files_before: int
    num_files: int
    num_bytes_before: int
    num_bytes: int


@dataclass(frozen=True)
class ForgetReport:
    """What forgetting took.

    Attributes:
        num_users: of those asked for, how many the catalog knew.
        num_rows: adapters of all versions that were deleted.
        num_packs: packs deleted, those written anew without the users among them.
        num_fragments: files of the catalog deleted: fragments, rollbacks and snapshots.
    """

    num_users: int
    num_rows: int
    num_packs: int
    num_fragments: int


@dataclass(frozen=True)
class VerifyReport:
    """What was checked and what is wrong.

    Attributes:
        num_rows: stored adapters of all versions.
        bad: one line for each that does not read back as it was written.
        orphans: packs that the catalog does not name: of units cut short or still being written.
    """

    num_rows: int
    bad: tuple[str, ...]
    orphans: tuple[str, ...]


@dataclass(frozen=True)
class StoreStats:
    """What a store holds. Sizes in bytes.

    Attributes:
        num_rows: stored adapters of all versions.
        num_packs: with the `num_orphans` among them that the catalog does not name.
    """

    num_users: int
    num_failed: int
    num_rows: int
    num_units: int
    last_version: int
    num_packs: int
    pack_bytes: int
    num_orphans: int
    num_catalog_files: int
    catalog_bytes: int

    @property
    def files_per_1000_users(self) -> float:
        """Files of all kinds for every 1,000 users."""
        return 1000 * (self.num_packs + self.num_catalog_files) / max(1, self.num_users)

    @property
    def index_bytes_per_user(self) -> float:
        """The catalog's share of one user."""
        return self.catalog_bytes / max(1, self.num_users)


def compact(files: Files, catalog: Catalog) -> CompactReport:
    """See AdapterStore."""
    found = catalog.load()
    before = _sizes(files, catalog)
    with _overtaken(files, catalog, found):
        packs = packs_to_merge(files, found.index)
    if packs or found.loose_units or found.loose_rollbacks:
        _replace(files, catalog, found, np.ones(found.index.table.num_rows, dtype=bool), packs)
    _clean(files, catalog, all_orphans=False)
    after = _sizes(files, catalog)
    return CompactReport(len(before), len(after), sum(before), sum(after))


def forget(files: Files, catalog: Catalog, users: Iterable[str]) -> ForgetReport:
    """See AdapterStore. Damaged records of others in packs written anew are copied as they are, and stay detectable."""
    users = list(users)
    found = catalog.load()
    index = found.index
    rows_by_user = {user: index.rows_of(user) for user in users}
    dropped = [row for rows in rows_by_user.values() for row in rows]
    keep = np.ones(index.table.num_rows, dtype=bool)
    keep[dropped] = False
    stored = index.is_status(STORED) & ~keep
    table, num_blanked = without_mentions(index, users)
    if dropped or num_blanked:
        packs = {index.packs[code] for code in np.unique(index.numbers("pack")[stored])} & files.listing(FOLDER).keys()
        as_found = AsFound(table, index.layouts, damaged(files, index, keep, packs))
        _replace(files, catalog, replace(found, index=as_found), keep, packs)
    num_packs, num_fragments = _clean(files, catalog, all_orphans=True)
    return ForgetReport(sum(map(bool, rows_by_user.values())), int(stored.sum()), num_packs, num_fragments)


def _replace(files: Files, catalog: Catalog, found: Contents, keep: np.ndarray, packs: set[str]) -> None:
    """Commit a snapshot of the kept rows, those in `packs` moved to new packs."""
    number = found.snapshot + 1
    with _overtaken(files, catalog, found):
        rewritten = rewrite(files, found.index, keep, packs, number)
    metadata = snapshot_metadata(found.units, found.rollbacks, found.index.layouts)
    won = catalog.files.create(snapshot_name(number), encoded(rewritten.table, metadata, "zstd"))
    if won and catalog.newest_snapshot() != number:
        # The number was free because others have gone further since: theirs counts, this one is unread.
        catalog.files.remove([snapshot_name(number)])
        won = False
    if not won:
        files.remove([f"{FOLDER}/{pack}" for pack in rewritten.new_packs])
        raise _was_faster(files)


@contextmanager
def _overtaken(files: Files, catalog: Catalog, found: Contents) -> Iterator[None]:
    """Where a pack is gone, say so: another compact or forget has replaced it, or it is lost."""
    try:
        yield
    except FileNotFoundError as error:
        if catalog.newest_snapshot() != found.snapshot:
            raise _was_faster(files) from None
        raise StoreError(f"pack {error.filename or error} is missing; restore the file or train again") from None


def _was_faster(files: Files) -> StoreError:
    return StoreError(f"store {files.location}: another compact or forget was faster; run it again")


def _clean(files: Files, catalog: Catalog, all_orphans: bool) -> tuple[int, int]:
    """Delete what the newest snapshot has replaced; returns how many packs and how many files of the catalog.

    Packs that nothing names are deleted where their unit is committed with another pack, and those of compactions up
    to this snapshot. Others may be of units that are being put at this moment; `all_orphans` takes them too.
    """
    packs = files.listing(FOLDER)  # before the catalog is read: what is put from here on is not touched
    found = catalog.load()
    in_snapshot = found.units - found.loose_units
    live = set(found.index.packs)
    garbage = [
        name
        for name in packs
        if name not in live
        and (all_orphans or unit_of_pack(name) in found.units or 0 < number_of_pack(name) <= found.snapshot)
    ]
    old = [f"{FRAGMENTS}/{name}" for name in catalog.listing(FRAGMENTS) if unit_of(name) in in_snapshot]
    old += [f"{ROLLBACKS}/{name}" for name in found.rollbacks - found.loose_rollbacks]
    old += [
        f"{SNAPSHOTS}/{name}"
        for name in catalog.listing(SNAPSHOTS)
        if f"{SNAPSHOTS}/{name}" < snapshot_name(found.snapshot)
    ]
    if all_orphans:  # what killed writers left half-written
        for folder in (FRAGMENTS, ROLLBACKS, SNAPSHOTS):
            old += [f"{folder}/{name}" for name in catalog.files.listing(folder) if name.startswith(".")]
    catalog.files.remove(old)
    files.remove([f"{FOLDER}/{name}" for name in garbage])
    return len(garbage), len(old)


def _sizes(files: Files, catalog: Catalog) -> list[int]:
    return [*files.listing(FOLDER).values(), *_catalog_sizes(catalog)]


def _catalog_sizes(catalog: Catalog) -> list[int]:
    return [size for folder in (FRAGMENTS, ROLLBACKS, SNAPSHOTS) for size in catalog.listing(folder).values()]


def verify(files: Files, catalog: Catalog) -> VerifyReport:
    """See AdapterStore."""
    found = catalog.load()
    bad = _damaged(files, found.index, np.flatnonzero(found.index.is_status(STORED)))
    while bad and catalog.newest_snapshot() != found.snapshot:
        # compacted meanwhile: what was sought in packs that are gone lies elsewhere now, or was forgotten
        sought = {(found.index.user_at(row), int(found.index.numbers("version")[row])) for row in bad}
        found = catalog.load()
        versions, stored = found.index.numbers("version"), found.index.is_status(STORED)
        again = [
            row
            for user in sorted({user for user, _ in sought})
            for row in found.index.rows_of(user)
            if stored[row] and (user, int(versions[row])) in sought
        ]
        bad = _damaged(files, found.index, np.array(again, dtype=np.int64))
    live = set(found.index.packs)
    orphans = [name for name in files.listing(FOLDER) if name not in live]
    num_rows = int(found.index.is_status(STORED).sum())
    return VerifyReport(num_rows, tuple(bad.values()), tuple(orphans))


def _damaged(files: Files, index: Index, stored: np.ndarray) -> dict[int, str]:
    """What is wrong with rows of the index, by row."""
    packs, rank, row = index.numbers("pack"), index.numbers("rank"), index.numbers("row")
    in_order = stored[np.lexsort((row[stored], rank[stored], packs[stored]))]
    changes = (np.diff(packs[in_order]) != 0) | (np.diff(rank[in_order]) != 0)
    bad: dict[int, str] = {}
    for rows in np.split(in_order, np.flatnonzero(changes) + 1):
        bad |= _bad_rows(files, index, rows.tolist())
    return bad


def _bad_rows(files: Files, index: Index, rows: Sequence[int]) -> dict[int, str]:
    """What is wrong with rows of one pack and rank, a line for each by row."""
    if not rows:
        return {}
    places = [index.place_at(row) for row in rows]
    try:
        header = read_header(files, places[0].pack)
    except (StoreError, FileNotFoundError) as error:
        return {row: f"user {index.user_at(row)!r}: {error}" for row in rows}
    step = max(1, CHUNK_BYTES // sum(record_bytes(header.layout.with_rank(places[0].rank), header.dtype)))
    bad: dict[int, str] = {}
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        try:
            read_records(files, [(header, place) for place in places[part]])
        except (StoreError, FileNotFoundError):  # one of them at least: look at each
            for row, place in zip(rows[part], places[part], strict=True):
                try:
                    read_records(files, [(header, place)])
                except (StoreError, FileNotFoundError) as error:
                    bad[row] = f"user {index.user_at(row)!r}: {error}"
    return bad


def stats(files: Files, catalog: Catalog, found: Contents) -> StoreStats:
    """See AdapterStore."""
    index = found.index
    packs, sizes = files.listing(FOLDER), _catalog_sizes(catalog)
    live = set(index.packs)
    return StoreStats(
        num_users=len(index.users()),
        num_failed=len(index.failures()),
        num_rows=int(index.is_status(STORED).sum()),
        num_units=len(found.units),
        last_version=max((version for _, version in found.units), default=0),
        num_packs=len(packs),
        pack_bytes=sum(packs.values()),
        num_orphans=sum(name not in live for name in packs),
        num_catalog_files=len(sizes),
        catalog_bytes=sum(sizes),
    )
