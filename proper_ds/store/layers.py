"""Two sets of adapters as one: some users have a newer adapter in the upper set, all others that of the lower one.

Read by prediction for methods that train some users on (`evaluation/methods.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from proper_ds.model.lora import LoraLayout
from proper_ds.store.store import AdapterStore

Tensor = torch.Tensor


class LayeredAdapters:
    """Reads like an AdapterStore.

    An adapter of the upper set counts while it was learned from the same history as the lower set's current one: after
    an update of the lower set, users with a new history get what was learned from it.
    """

    def __init__(self, upper: AdapterStore, lower: AdapterStore) -> None:
        self._upper, self._lower = upper, lower

    def has(self, user: str) -> bool:
        """Whether a user's adapter is stored."""
        return self._lower.has(user)

    def users(self) -> list[str]:
        """Users with an adapter."""
        return self._lower.users()

    @property
    def layout(self) -> LoraLayout:
        """The widest layout of the lower set, which the upper one was trained in."""
        return self._lower.layout

    def is_upper(self, user: str) -> bool:
        """Whether the user's adapter is that of the upper set."""
        upper, lower = self._upper.entry(user), self._lower.entry(user)
        return self._upper.has(user) and upper is not None and lower is not None and upper.digest == lower.digest

    def get_many(self, users: Sequence[str]) -> Tensor:
        """Adapters [N, P] in fp32, in the order of `users`. Raises StoreError, see AdapterStore."""
        rows_NP = torch.empty(len(users), self.layout.num_parameters)
        chosen = [self.is_upper(user) for user in users]
        for store, is_upper in ((self._upper, True), (self._lower, False)):
            places = [n for n, upper in enumerate(chosen) if upper is is_upper]
            if places:
                rows_NP[places] = store.get_many([users[n] for n in places])
        return rows_NP
