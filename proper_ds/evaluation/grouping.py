"""How good the grouping is where the true groups are known, as for generated data: adjusted Rand index and NMI.

The report calls `grouping_of`; nothing that trains reads the true groups.
Shapes: U users, M modules with experts, N experts, C columns of a point.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from proper_ds.data.generate import TRUTH

NUM_STARTS, NUM_ROUNDS = 10, 100


def adjusted_rand_index(one: np.ndarray, other: np.ndarray) -> float:
    """Agreement of two partitions of the same users (Hubert and Arabie 1985): 1 for equal ones, 0 as by chance.

    Args:
        one: a label for each user [U]; names of labels do not matter.
        other: the same [U].
    """
    counts = _contingency(one, other)
    pairs = float(_pairs(counts).sum())
    of_one, of_other = float(_pairs(counts.sum(1)).sum()), float(_pairs(counts.sum(0)).sum())
    total = len(one) * (len(one) - 1) / 2
    expected = of_one * of_other / total if total else 0.0
    most = (of_one + of_other) / 2
    return 1.0 if most == expected else (pairs - expected) / (most - expected)


def normalized_mutual_information(one: np.ndarray, other: np.ndarray) -> float:
    """Mutual information over the mean of the two entropies: 1 for equal partitions, 0 for independent ones."""
    joint = _contingency(one, other) / len(one)
    p, q = joint.sum(1), joint.sum(0)
    entropy = (_entropy(p) + _entropy(q)) / 2
    return 1.0 if entropy == 0 else float((_entropy(p) + _entropy(q) - _entropy(joint.ravel())) / entropy)


def _contingency(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    assert len(one) == len(other) > 0, "partitions of the same users"
    _, rows = np.unique(one, return_inverse=True)
    _, columns = np.unique(other, return_inverse=True)
    counts = np.zeros((rows.max() + 1, columns.max() + 1), dtype=np.int64)
    np.add.at(counts, (rows, columns), 1)
    return counts


def _pairs(counts: np.ndarray) -> np.ndarray:
    return counts * (counts - 1) / 2


def _entropy(shares: np.ndarray) -> float:
    present = shares[shares > 0]
    return float(-(present * np.log(present)).sum())


def k_means(points_UC: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """A cluster for each point [U]: Lloyd 1982 from starts by Arthur and Vassilvitskii 2007, the best of several."""
    generator = np.random.default_rng(seed)
    best, least = np.zeros(len(points_UC), dtype=np.int64), np.inf
    for _ in range(NUM_STARTS):
        centres_KC = _spread_start(points_UC, num_clusters, generator)
        for _ in range(NUM_ROUNDS):
            distance_UK = _distances(points_UC, centres_KC)
            labels = distance_UK.argmin(1)
            members = [points_UC[labels == k] for k in range(num_clusters)]
            moved = np.stack([m.mean(0) if len(m) else c for m, c in zip(members, centres_KC, strict=True)])
            if np.array_equal(moved, centres_KC):
                break
            centres_KC = moved
        spread = float(_distances(points_UC, centres_KC).min(1).sum())
        if spread < least:
            best, least = labels, spread
    return best


def _spread_start(points_UC: np.ndarray, num_clusters: int, generator: np.random.Generator) -> np.ndarray:
    centres = [points_UC[generator.integers(len(points_UC))]]
    while len(centres) < num_clusters:
        distance_U = _distances(points_UC, np.stack(centres)).min(1)
        total = distance_U.sum()
        chance = distance_U / total if total > 0 else None
        centres.append(points_UC[generator.choice(len(points_UC), p=chance)])
    return np.stack(centres)


def _distances(points_UC: np.ndarray, centres_KC: np.ndarray) -> np.ndarray:
    return np.stack([((points_UC - centre_C) ** 2).sum(1) for centre_C in centres_KC], axis=1)


def read_truth(paths: Sequence[str]) -> dict[str, int]:
    """The true group by user key, from files beside the data; {} where no data says."""
    found: dict[str, int] = {}
    for path in paths:
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        if (folder / TRUTH).exists():
            found |= dict(json.loads((folder / TRUTH).read_text(encoding="utf-8")))
    return found


def grouping_of(gates: Mapping[str, tuple[list[str], np.ndarray]], truth: Mapping[str, int]) -> dict[str, Any]:
    """By method with groups, how its users' mean gates agree with the true groups; {} without true groups.

    Args:
        gates: by method, the users' keys and their mean gates [U, M, N].
        truth: true group by key.

    Returns:
        `strongest`: users by the expert with the largest gate on average over the modules; `k_means`: users by as many
        clusters of their gates in all modules as there are true groups among them.
    """
    found: dict[str, Any] = {}
    for method, (keys, gates_UMN) in gates.items():
        known = [place for place, key in enumerate(keys) if key in truth]
        if not known:
            continue
        groups = np.asarray([truth[keys[place]] for place in known])
        chosen_UMN = gates_UMN[known]
        num_groups = len(np.unique(groups))
        parts = {
            "strongest": chosen_UMN.mean(1).argmax(-1),
            "k_means": k_means(chosen_UMN.reshape(len(known), -1), num_groups, seed=0),
        }
        found[method] = {"num_users": len(known), "num_groups": num_groups, "num_experts": gates_UMN.shape[-1]} | {
            name: {
                "adjusted_rand_index": adjusted_rand_index(groups, labels),
                "normalized_mutual_information": normalized_mutual_information(groups, labels),
            }
            for name, labels in parts.items()
        }
    return found
