"""Cuts users into work units; a pure function of the data and the unit size, so every run of the same data agrees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Unit:
    """Consecutive users `first` up to `stop`, trained and committed together, in this order, wherever and whenever.

    Attributes:
        cost: tokens of one epoch.
        part: which of a job's parts this unit belongs to, such as the set of adapters it makes.
        num_users: users with any cost; the others are passed over.
    """

    first: int
    stop: int
    cost: int
    part: str = ""
    num_users: int = 0

    @property
    def name(self) -> str:
        """The same for the same users; packs and fragments are called so."""
        return f"unit-{self.first:010d}-{self.stop:010d}"


def plan_units(cost_per_user: np.ndarray, num_tokens_per_unit: int, part: str = "") -> list[Unit]:
    """Units of similar cost, costliest first (so that the last to finish is a small one).

    Args:
        cost_per_user: tokens of each user; users of cost 0 belong to a unit too, and are passed over there.
        num_tokens_per_unit: a unit is closed once it holds so many tokens.
    """
    tokens_until = np.cumsum(cost_per_user, dtype=np.int64)
    users_until = np.cumsum(cost_per_user > 0)
    units, first, tokens, users = [], 0, 0, 0
    while first < len(cost_per_user):
        stop = min(int(np.searchsorted(tokens_until, tokens + num_tokens_per_unit)) + 1, len(cost_per_user))
        cost, num_users = int(tokens_until[stop - 1]) - tokens, int(users_until[stop - 1]) - users
        if cost:
            units.append(Unit(first, stop, cost, part, num_users))
        first, tokens, users = stop, tokens + cost, users + num_users
    return sorted(units, key=lambda unit: (-unit.cost, unit.first))
