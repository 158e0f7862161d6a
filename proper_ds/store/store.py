"""The adapter store of one method: put whole work units, get adapters by user.

Actors of the fleet put; prediction, the router stage and `proper-ds store` read. Knows neither ray nor deepspeed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from proper_ds.errors import StoreError
from proper_ds.model.lora import LoraLayout
from proper_ds.store import maintenance
from proper_ds.store.catalog import Catalog
from proper_ds.store.codec import decode
from proper_ds.store.files import open_files
from proper_ds.store.index import FAILED, ROLLBACK, STORED, Entry, Index
from proper_ds.store.maintenance import CompactReport, ForgetReport, StoreStats, VerifyReport
from proper_ds.store.packs import FOLDER, PackHeader, Place, name_of_pack, read_header, read_records, write_pack

Tensor = torch.Tensor

_MAX_HEADERS = 4096


class AdapterStore:
    """Packs in `packs/`, the catalog in `catalog/`, below one location: a local path or an fsspec URI.

    What the store reads of the catalog it keeps; `refresh` looks again. What it changes itself it sees at once.
    See `files.Files` for which places can be stores and what a commit guarantees there.
    """

    def __init__(self, location: str | Path) -> None:
        self.location = location
        self.files = open_files(location)
        self.catalog = Catalog(f"{str(location).rstrip('/')}/catalog")
        self._loaded: Index | None = None
        self._headers: OrderedDict[str, PackHeader] = OrderedDict()

    def put_unit(
        self,
        unit: str,
        adapters: dict[str, Tensor],
        failures: dict[str, str],
        losses: dict[str, tuple[int, list[float]]],
        layout: LoraLayout,
        dtype: str,
        *,
        version: int = 1,
        digests: dict[str, str] | None = None,
    ) -> int:
        """Commit one work unit and return the bytes of its pack.

        The first commit of a unit at a version stands. Where there is one already, whether from before or from
        another writer at the same moment, nothing changes and 0 is returned: a retry has nothing left to do.

        Args:
            unit: the unit's name.
            adapters: rows [P] by user, of any rank up to `layout.r`.
            failures: the reason by user for those without an adapter.
            losses: (number of items, losses by step) of each user.
            layout: the widest of the store.
            dtype: how adapters are stored: float32, bfloat16 or int8.
            version: from 1; a user's highest stored version is current.
            digests: hex digest by user of the history that the adapter was learned from.

        Raises:
            AdapterError: for an adapter that is the wrong size, not finite or without effect.
        """
        num_bytes, places = 0, dict[str, Place]()
        # a pack of its own for each try: two writers of one unit never touch each other's
        pack = name_of_pack(unit, version)
        if adapters:
            num_bytes, places = write_pack(self.files, pack, adapters, layout, dtype)
        nowhere, digests = Place("", 0, -1, 0), digests or {}
        entries = [
            _entry(user, version, STORED, "", places[user], losses[user], digests.get(user, "")) for user in adapters
        ]
        entries += [
            _entry(user, version, FAILED, reason, nowhere, losses[user], digests.get(user, ""))
            for user, reason in failures.items()
        ]
        if not self.catalog.commit(unit, version, entries, layout if adapters else None):
            self.files.remove([f"{FOLDER}/{pack}"] if adapters else [])
            return 0
        if self.catalog.is_in_snapshot(unit, version):
            # Compacted before this commit, which readers then ignore, or since, this very commit: the next compaction
            # knows and removes what is not needed.
            return 0
        self._loaded = None
        return num_bytes

    def refresh(self) -> None:
        """Look again at what is committed; also lets go of files deleted since."""
        self._loaded = None
        self._headers.clear()
        self.files.forget_handles()

    @property
    def _index(self) -> Index:
        if self._loaded is None:
            self._loaded = self.catalog.load().index
        return self._loaded

    def units(self, version: int = 1) -> set[str]:
        """See Catalog."""
        return self.catalog.units(version)

    def has_unit(self, unit: str, version: int) -> bool:
        """See Catalog."""
        return self.catalog.has_unit(unit, version)

    def last_version(self) -> int:
        """See Catalog."""
        return self.catalog.last_version()

    def entry(self, user: str) -> Entry | None:
        """The current entry of a user, or None: the highest version stored, unless rolled back since.

        A version whose training failed does not take the place of an adapter that is stored.
        """
        return self._index.current(user)

    def history(self, user: str) -> list[Entry]:
        """Every version and rollback of a user, oldest first."""
        return self._index.history(user)

    def users(self) -> list[str]:
        """Users with an adapter, in catalog order."""
        return self._index.users()

    def failures(self) -> dict[str, str]:
        """Reasons by user for those who have no adapter because training failed."""
        return self._index.failures()

    def has(self, user: str) -> bool:
        """Whether a user's adapter is stored."""
        row = self._index.current_row(user)
        return row is not None and bool(self._index.is_status(STORED)[row])

    def has_many(self, users: pa.LargeStringArray) -> np.ndarray:
        """Mask over the keys: those whose adapter is stored; for a million of them at once."""
        return self._index.has_many(users)

    @property
    def layout(self) -> LoraLayout:
        """The widest layout of the stored adapters. Raises StoreError where there are none, or of several models."""
        layout = self._index.layout
        if layout is None:
            raise StoreError(f"store {self.location} holds no adapter")
        return layout

    def get(self, user: str) -> Tensor:
        """A user's adapter [P] in fp32. Raises StoreError where there is none, with the reason if it is known."""
        return self.get_many([user])[0]

    def get_many(self, users: Sequence[str]) -> Tensor:
        """Adapters [N, P] in fp32 in the store's widest layout, in the order of `users`, checksums checked.

        Raises:
            StoreError: where a user has no adapter, or a pack does not hold what the catalog says.
        """
        layout, groups = self.layout, self._groups(users)
        if len(groups) == 1 and groups[0][1] == layout:
            return groups[0][2]
        rows_NP = torch.empty(len(users), layout.num_parameters)
        for positions, own, found_NP in groups:
            for position, row_P in zip(positions, found_NP, strict=True):
                rows_NP[position] = layout.widened(row_P, own.r)
        return rows_NP

    def get_exact(self, user: str) -> tuple[Tensor, LoraLayout]:
        """A user's adapter [P] in fp32 at the rank it was trained with, and that layout. Raises StoreError."""
        ((_, own, row_NP),) = self._groups([user])
        return row_NP[0], own

    def _groups(self, users: Sequence[str]) -> list[tuple[list[int], LoraLayout, Tensor]]:
        """(places in `users`, layout, adapters [N, P]) for each type and rank among them."""
        try:
            return self._read(users)
        except FileNotFoundError:  # compacted since the catalog was read
            self.refresh()
        try:
            return self._read(users)
        except FileNotFoundError as error:
            raise StoreError(f"pack {error.filename or error} is missing; restore the file or train again") from None

    def _read(self, users: Sequence[str]) -> list[tuple[list[int], LoraLayout, Tensor]]:
        index, groups = self._index, dict[tuple[str, int], list[int]]()
        wanted = []
        for position, user in enumerate(users):
            place = index.place_at(self._stored_row(user))
            header = self._header(place.pack)
            wanted.append((header, place))
            groups.setdefault((header.dtype, place.rank), []).append(position)
        found = []
        for (dtype, rank), positions in groups.items():
            own = self.layout.with_rank(rank)
            records = read_records(self.files, [wanted[position] for position in positions])
            found.append((positions, own, decode(records, own, dtype)))
        return found

    def _stored_row(self, user: str) -> int:
        index = self._index
        row = index.current_row(user)
        if row is None:
            raise StoreError(f"store {self.location} has no user {user!r} (cold, or not trained)")
        if not index.is_status(STORED)[row]:
            raise StoreError(f"user {user!r} has no adapter: training failed ({index.entry_at(row).reason})")
        return row

    def _header(self, pack: str) -> PackHeader:
        header = self._headers.get(pack)
        if header is None:
            if len(self._headers) >= _MAX_HEADERS:
                self._headers.popitem(last=False)
            header = self._headers[pack] = read_header(self.files, pack)
        return header

    def rollback(self, user: str, version: int | None = None) -> Entry:
        """Make an earlier stored version of a user current again, durably, and return its entry.

        Args:
            version: the one before the current one unless given.

        Raises:
            StoreError: where there is no such version, naming those there are; or where somebody else rolled the user
                back at the same moment.
        """
        self.refresh()
        current, history = self._index.entry_at(self._stored_row(user)), self.history(user)
        stored = sorted({entry.version for entry in history if entry.status == STORED})
        if version is None:
            version = max((held for held in stored if held < current.version), default=0)
        if version not in stored:
            held = ", ".join(map(str, stored))
            what = f"version {version}" if version else f"version before {current.version}"
            raise StoreError(f"user {user!r} has no {what}; stored are {held}, current is {current.version}")
        if version == current.version:
            return current
        over = stored[-1]
        turn = 1 + sum(entry.status == ROLLBACK and entry.over == over for entry in history)
        nan = float("nan")
        event = Entry(user, version, ROLLBACK, "", "", 0, -1, 0, 0, 0, nan, nan, "", over, turn)
        committed = self.catalog.commit_rollback(event)
        self.refresh()
        found = self._index.current(user)
        if not committed or found is None or found.version != version:
            raise StoreError(f"user {user!r} was rolled back by somebody else at the same moment; look at its history")
        return found

    def forget(self, users: Iterable[str]) -> ForgetReport:
        """Delete every version of these users: afterwards no file of the store holds anything of them.

        Packs that hold them are written anew without them, the catalog as one new snapshot; then the old files are
        deleted, together with packs that no catalog names (of units cut short, which may hold them too). Call it while
        nobody puts. Cut short anywhere, a second call finishes the work, also for users no longer in the catalog. Work
        units stay committed: a resumed run does not train them again. What the file system or object store keeps of
        deleted files (snapshots, object versions, blocks not yet overwritten) is its own.

        Raises:
            StoreError: where a pack to be written anew is damaged, or another compact or forget was faster.
        """
        try:
            return maintenance.forget(self.files, self.catalog, users)
        finally:
            self.refresh()

    def compact(self) -> CompactReport:
        """Merge small packs, and fragments into one snapshot, then delete the old files.

        Safe while others put and read; cut short anywhere the store reads the same. Every version stays.

        Raises:
            StoreError: where a pack to be merged is damaged, or another compact or forget was faster.
        """
        try:
            return maintenance.compact(self.files, self.catalog)
        finally:
            self.refresh()

    def verify(self) -> VerifyReport:
        """Check the checksum of every stored row of every version, and look for packs that no catalog names.

        Safe while others put, read and compact.
        """
        self.refresh()
        return maintenance.verify(self.files, self.catalog)

    def stats(self) -> StoreStats:
        """What the store holds and what it costs."""
        return maintenance.stats(self.files, self.catalog, self.catalog.load())


def _entry(
    user: str, version: int, status: str, reason: str, place: Place, history: tuple[int, list[float]], digest: str
) -> Entry:
    num_items, losses = history
    nan = float("nan")
    first, last = (losses[0], losses[-1]) if losses else (nan, nan)
    return Entry(
        user,
        version,
        status,
        reason,
        place.pack,
        place.rank,
        place.row,
        place.checksum,
        num_items,
        len(losses),
        first,
        last,
        digest,
        version,
        0,
    )
