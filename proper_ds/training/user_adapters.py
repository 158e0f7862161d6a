"""Users' adapters as rank stages read them: of a sample of users, by micro-batch, straight from the store.

A rank never holds more of them than its micro-batch has users, and asks the catalog by columns, so that a million users
in the store cost some arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from proper_ds.distributed.ranks import Ranks
from proper_ds.errors import StoreError
from proper_ds.model.lora import LoraLayout
from proper_ds.observe.log import get_logger
from proper_ds.store.elsewhere import check_in_place, open_store
from proper_ds.training.context import RunContext

Tensor = torch.Tensor

_USERS_PER_READ = 64


class UserAdapters:
    """The adapters of one set."""

    def __init__(self, context: RunContext, adapter_set: str) -> None:
        self._context = context
        self._store = open_store(context.stage(f"store/{adapter_set}").path)
        self._name = f"store/{adapter_set}"

    @property
    def layout(self) -> LoraLayout:
        """The widest layout of the set."""
        return self._store.layout

    def stored(self, mask_U: np.ndarray) -> np.ndarray:
        """The part of a mask over users whose adapter is stored."""
        found, chosen = np.zeros_like(mask_U), np.flatnonzero(mask_U)
        found[chosen] = self._store.has_many(self._context.key_column.take(chosen))
        return found

    def rows(self, users: Sequence[int]) -> Tensor:
        """Adapters [N, P] in the widest layout, on the CPU. Raises StoreError where one cannot be read."""
        return self._store.get_many(self._keys(users))

    def _keys(self, users: Sequence[int]) -> list[str]:
        found: list[str] = self._context.key_column.take(np.asarray(users, dtype=np.int64)).to_pylist()
        return found

    def without_damaged(self, mask_U: np.ndarray, max_share: float, ranks: Ranks, stage: str) -> np.ndarray:
        """The part of a mask over users whose adapters can be read, checksums compared; a collective.

        Each rank reads its share of them once. Who is left out is said, and what was wrong with some of them.

        Args:
            max_share: of the users; where more are damaged, the run ends.

        Raises:
            StoreError: there, and where the whole store is gone.
        """
        mine = np.flatnonzero(mask_U)[ranks.rank :: ranks.num_ranks]
        damaged: dict[int, str] = {}
        for start in range(0, len(mine), _USERS_PER_READ):
            damaged |= self._damaged(mine[start : start + _USERS_PER_READ].tolist())
        for user, reason in list(damaged.items())[:5]:
            get_logger().warning("%s: the adapter of user %r is left out: %s", stage, self._keys([user])[0], reason)
        lost = ranks.gather_rows(torch.tensor(sorted(damaged), dtype=torch.int64, device=ranks.device)).cpu().numpy()
        num = int(mask_U.sum())
        if len(lost) > max_share * num:
            raise StoreError(
                f"{stage}: {len(lost)} of {num} adapters of {self._name} cannot be read, more than"
                f" max_damaged_share {max_share} allows (the ranks' logs name some); `proper-ds store verify` lists"
                " them: restore the files, or train the set again"
            )
        if len(lost) and ranks.is_first:
            get_logger().warning("%s: %d of %d adapters cannot be read and are left out", stage, len(lost), num)
        found = mask_U.copy()
        found[lost] = False
        return found

    def _damaged(self, users: list[int]) -> dict[int, str]:
        """Why adapters cannot be read, by user."""
        try:
            self.rows(users)
            return {}
        except StoreError:  # one of them at least: look at each
            check_in_place(self._store)
        found = {}
        for user in users:
            try:
                self.rows([user])
            except StoreError as error:
                found[user] = str(error)
        return found
