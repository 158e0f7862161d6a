"""The adapter store of one method: put whole work units, get adapters by user.

Actors of the fleet put; prediction, the router stage and `proper-ds store get` read. Knows neither ray nor deepspeed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from proper_ds.errors import StoreError
from proper_ds.model.adapter_file import check_row
from proper_ds.model.lora import LoraLayout
from proper_ds.store.catalog import FAILED, STORED, Catalog, Entry
from proper_ds.store.packs import DTYPES, read_layout, read_rows, write_pack

Tensor = torch.Tensor


class AdapterStore:
    """Packs in `packs/`, catalog fragments in `catalog/`, below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.catalog = Catalog(folder / "catalog")

    def put_unit(
        self,
        unit: str,
        adapters: dict[str, Tensor],
        failures: dict[str, str],
        losses: dict[str, tuple[int, list[float]]],
        layout: LoraLayout,
        dtype: str,
    ) -> int:
        """Commit one work unit and return the bytes of its pack.

        Args:
            unit: the unit's name; putting it again replaces it.
            adapters: rows [P] by user.
            failures: the reason by user for those without an adapter.
            losses: (number of items, losses by step) of each user.
            dtype: how adapters are stored.

        Raises:
            AdapterError: for an adapter that is the wrong size, not finite or without effect.
        """
        pack, num_bytes = "", 0
        checksums: list[int] = []
        if adapters:
            for user, row_P in adapters.items():
                check_row(row_P, layout, f"adapter of user {user!r}")
            rows_NP = torch.stack(list(adapters.values())).to(DTYPES[dtype])
            pack = f"{unit}.safetensors"
            checksums = write_pack(self.folder / "packs" / pack, rows_NP, layout)
            num_bytes = (self.folder / "packs" / pack).stat().st_size
        entries = [
            _entry(user, STORED, "", pack, row, checksums[row], losses[user]) for row, user in enumerate(adapters)
        ]
        entries += [_entry(user, FAILED, reason, "", -1, 0, losses[user]) for user, reason in failures.items()]
        self.catalog.commit(unit, entries)
        return num_bytes

    @cached_property
    def _index(self) -> dict[str, Entry]:
        return {entry.user: entry for entry in self.catalog.entries()}

    def entry(self, user: str) -> Entry | None:
        """What the catalog says of a user, or None."""
        return self._index.get(user)

    def users(self) -> list[str]:
        """Users with an adapter, in catalog order."""
        return [user for user, entry in self._index.items() if entry.status == STORED]

    def failures(self) -> dict[str, str]:
        """Reasons by user for those whose training failed."""
        return {user: entry.reason for user, entry in self._index.items() if entry.status == FAILED}

    def has(self, user: str) -> bool:
        """Whether a user's adapter is stored."""
        entry = self._index.get(user)
        return entry is not None and entry.status == STORED

    @cached_property
    def layout(self) -> LoraLayout:
        """The layout of the stored adapters. Raises StoreError where there are none."""
        for entry in self._index.values():
            if entry.pack:
                return read_layout(self.folder / "packs" / entry.pack)
        raise StoreError(f"store {self.folder} holds no adapter")

    def get(self, user: str) -> Tensor:
        """A user's adapter [P] in fp32. Raises StoreError where there is none, with the reason if it is known."""
        return self.get_many([user])[0]

    def get_many(self, users: Sequence[str]) -> Tensor:
        """Adapters [N, P] in fp32, in the order of `users`; packs are opened once each."""
        by_pack: dict[str, list[tuple[int, Entry]]] = {}
        for position, user in enumerate(users):
            entry = self._index.get(user)
            if entry is None:
                raise StoreError(f"store {self.folder} has no user {user!r} (cold, or not trained)")
            if entry.status != STORED:
                raise StoreError(f"user {user!r} has no adapter: training failed ({entry.reason})")
            by_pack.setdefault(entry.pack, []).append((position, entry))
        rows_NP = torch.empty(len(users), self.layout.num_parameters)
        for pack, wanted in by_pack.items():
            found = read_rows(self.folder / "packs" / pack, [e.row for _, e in wanted], [e.checksum for _, e in wanted])
            for (position, _), row_P in zip(wanted, found, strict=True):
                rows_NP[position] = row_P.float()
        return rows_NP


def _entry(
    user: str, status: str, reason: str, pack: str, row: int, check: int, history: tuple[int, list[float]]
) -> Entry:
    num_items, losses = history
    nan = float("nan")
    first, last = (losses[0], losses[-1]) if losses else (nan, nan)
    return Entry(user, 1, status, reason, pack, row, check, num_items, len(losses), first, last)
