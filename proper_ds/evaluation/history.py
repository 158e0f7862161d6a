"""Who has how much history: buckets of equally many users, cold users, and the lower and upper half.

Pure functions of two arrays, [Q] each: the history items and the index of the user of each question.
"""

from __future__ import annotations

import numpy as np

NUM_BUCKETS = 4

Range = tuple[str, int, int]
"""(label, from, to) in history items, both included."""


def _lengths(history: np.ndarray, users: np.ndarray) -> np.ndarray:
    """Each user's history length, ascending."""
    _, first = np.unique(users, return_index=True)
    return np.sort(history[first])


def history_buckets(history: np.ndarray, users: np.ndarray) -> list[Range]:
    """Users without history, then about equally many users in each bucket; every user is in exactly one."""
    lengths = _lengths(history, users)
    buckets = [("0", 0, 0)] if lengths[0] == 0 else []
    warm = lengths[lengths > 0]
    if not len(warm):
        return buckets
    edges = sorted({int(edge) for edge in np.quantile(warm, np.linspace(0, 1, NUM_BUCKETS + 1)[1:], method="lower")})
    start = 0
    for edge in edges:  # each the length of somebody
        low, stop = int(warm[start]), int(np.searchsorted(warm, edge, side="right"))
        buckets.append((f"{low}-{edge}" if edge > low else str(low), low, edge))
        start = stop
    return buckets


def history_parts(history: np.ndarray, users: np.ndarray) -> list[tuple[str, Range]]:
    """(`cold`, `lower half` or `upper half`; its range), of those that have anybody in them.

    Cold users have none or one item. The halves part users at the length that cuts nearest to the middle: users with
    equally long histories are never parted, so halves may differ in size; where all are equally long there are none.
    """
    lengths = _lengths(history, users)
    found: list[tuple[str, Range]] = []
    if lengths[0] <= 1:
        found.append(("cold", ("0-1", 0, 1)))
    shortest, longest = int(lengths[0]), int(lengths[-1])
    if shortest == longest:
        return found
    cuts = np.unique(lengths)[:-1]  # the lower half ends at one of these
    num_lower = np.searchsorted(lengths, cuts, side="right")
    cut = int(cuts[np.abs(2 * num_lower - len(lengths)).argmin()])
    lower: Range = (f"{shortest}-{cut}" if cut > shortest else str(cut), shortest, cut)
    rest = int(lengths[lengths > cut][0])
    upper: Range = (f"{rest}-{longest}" if longest > rest else str(rest), rest, longest)
    return [*found, ("lower half", lower), ("upper half", upper)]
