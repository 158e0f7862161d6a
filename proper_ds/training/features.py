"""User features: what the population model got wrong about each history item; made by the fleet, read by later stages.

One safetensors file a work unit, holding the items' features and each user's sum.
Shapes: I history items, F feature size, U users of a unit, B bytes of a digest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from proper_ds.data.batches import collate, length_batches
from proper_ds.data.tokens import Example
from proper_ds.files import atomic_path
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.user_vectors import PRIOR_ITEMS, item_features, pooled
from proper_ds.run_folder import RunFolder, StageFolder

Tensor = torch.Tensor

_PREFIX = "unit-"
_NO_DIGEST = "0" * 32


def compute_features(model: PersonalModel, examples: Sequence[Example], num_tokens: int) -> Tensor:
    """Features [I, F] of history items, fp32 on the CPU; at most `num_tokens` padded tokens in one pass."""
    found: list[Tensor | None] = [None] * len(examples)
    with torch.no_grad():
        for part in length_batches([len(e.ids) for e in examples], num_tokens):
            batch = collate([examples[i] for i in part], model.device)
            states_RTD = model.hidden(batch.ids_RT)
            logits_KV = model.logits_at(states_RTD, batch.row_K, batch.position_K)
            state_KD = states_RTD[batch.row_K, batch.position_K]
            features_RF = item_features(state_KD, logits_KV, batch.target_K, batch.row_K, model.head_weight)
            for i, row_F in zip(part, features_RF.cpu(), strict=True):
                found[i] = row_F
    return torch.stack([row for row in found if row is not None])


def write_features(
    folder: Path, first_user: int, counts: Sequence[int], items_IF: Tensor, digests: Sequence[str]
) -> None:
    """Commit the features of consecutive users.

    Args:
        counts: the users' numbers of history items.
        digests: hex digests of the users' histories, "" where there is none.
    """
    sums_UF = torch.stack([part.sum(0) for part in items_IF.split(list(counts))])
    digests_UB = np.frombuffer(bytes.fromhex("".join(digest or _NO_DIGEST for digest in digests)), dtype=np.uint8)
    tensors = {
        "items": items_IF.contiguous(),
        "sums": sums_UF,
        "counts": torch.tensor(counts),
        "digests": torch.from_numpy(digests_UB.reshape(len(digests), -1).copy()),
    }
    with atomic_path(folder / f"{_PREFIX}{first_user:010d}.safetensors") as path:
        save_file(tensors, path)


def is_written(folder: Path, first_user: int) -> bool:
    """Whether the unit that begins with this user is committed."""
    return (folder / f"{_PREFIX}{first_user:010d}.safetensors").exists()


def previous_features(run: RunFolder, name: str = "features") -> FeatureData | None:
    """The newest features moved aside that were made on the population model of the running features stage."""
    begun = run.stage(name).begun()
    assert begun is not None, f"{name} was not begun"
    for path in sorted(run.superseded(name), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        found = StageFolder(path.parent, path.name).inputs()
        if found is not None and found["made_from"].get("population") == begun["made_from"]["population"]:
            return FeatureData(path)
    return None


class FeatureData:
    """Reads features by user and item from the units' files."""

    def __init__(self, folder: Path) -> None:
        self._paths = sorted(folder.glob(f"{_PREFIX}*.safetensors"))
        self._first = np.asarray([int(path.stem.removeprefix(_PREFIX)) for path in self._paths])
        self._counts = [self._read(n, "counts").numpy() for n in range(len(self._paths))]
        self._offsets = [np.concatenate([[0], np.cumsum(counts)]) for counts in self._counts]

    def _read(self, unit: int, name: str) -> Tensor:
        with safe_open(self._paths[unit], "pt") as file:
            found: Tensor = file.get_tensor(name)
        return found

    @property
    def feature_size(self) -> int:
        """F."""
        return self._unit(0)["sums"].shape[1]

    @lru_cache(maxsize=256)  # noqa: B019 - one reader a process; the files are mapped, not copied
    def _unit(self, unit: int) -> dict[str, Tensor]:
        return load_file(self._paths[unit])

    def _locate(self, user: int) -> tuple[int, int]:
        unit = int(np.searchsorted(self._first, user, side="right")) - 1
        return unit, user - int(self._first[unit])

    def user(self, user: int) -> tuple[Tensor, int]:
        """(sum of the user's item features [F], number of items)."""
        unit, row = self._locate(user)
        return self._unit(unit)["sums"][row], int(self._counts[unit][row])

    def has(self, user: int) -> bool:
        """Whether there is such a user, with history or without."""
        unit, row = self._locate(user)
        return unit >= 0 and row < len(self._counts[unit])

    def items_of_history(self, user: int, digest: str) -> Tensor | None:
        """Features [I, F] of a user whose history had this digest when they were made, else None."""
        if not self.has(user):
            return None
        unit, row = self._locate(user)
        made_from = bytes(self._unit(unit)["digests"][row].numpy()).hex()
        return self.items(user) if digest and made_from == digest else None

    def items(self, user: int) -> Tensor:
        """Features [I, F] of all history items of a user."""
        unit, row = self._locate(user)
        return self._unit(unit)["items"][int(self._offsets[unit][row]) : int(self._offsets[unit][row + 1])]

    def all_pooled(self) -> Iterator[Tensor]:
        """Pooled features [U, F] of all users in order, a unit at a time."""
        for unit in range(len(self._paths)):
            counts = torch.from_numpy(self._counts[unit])
            yield pooled(self._read(unit, "sums"), counts.unsqueeze(1))

    def mean_and_std(self, users: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [F] over the pooled features of the masked `users` that have history."""
        total = square = torch.zeros(self.feature_size, dtype=torch.float64)
        count = 0
        for unit, first in enumerate(self._first):
            counts = torch.from_numpy(self._counts[unit])
            chosen = torch.from_numpy(users[first : first + len(counts)]) & (counts > 0)
            found = self._unit(unit)["sums"][chosen].double() / (counts[chosen] + PRIOR_ITEMS).unsqueeze(1)
            total = total + found.sum(0)
            square = square + found.square().sum(0)
            count += len(found)
        mean = total / max(count, 1)
        std = (square / max(count, 1) - mean.square()).clamp_min(0).sqrt()
        # a feature that is the same for everybody says nothing: leave it at the mean
        return mean.float(), torch.where(std > 1e-6, std, torch.ones_like(std)).float()
