"""Embeddings of users' questions and history items for PPlug: one safetensors file a work unit, read by user.

Written by `embeddings_job.py`, read by the PPlug stage and its answers.
Shapes: I history items, Q questions, E embedding size, U users of a unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from proper_ds.files import atomic_path

Tensor = torch.Tensor

_PREFIX = "unit-"


@dataclass(frozen=True)
class UserEmbeddings:
    """Of one user, as the encoder gives them.

    Attributes:
        keys_IE: the items' questions, without answers.
        values_IE: the items with their answers.
        queries_QE: the user's questions, all splits.
    """

    keys_IE: Tensor
    values_IE: Tensor
    queries_QE: Tensor


def write_embeddings(folder: Path, first_user: int, users: Sequence[UserEmbeddings]) -> None:
    """Commit the embeddings of consecutive users."""
    tensors = {
        "keys": torch.cat([user.keys_IE for user in users]),
        "values": torch.cat([user.values_IE for user in users]),
        "queries": torch.cat([user.queries_QE for user in users]),
        "num_items": torch.tensor([len(user.keys_IE) for user in users]),
        "num_queries": torch.tensor([len(user.queries_QE) for user in users]),
    }
    with atomic_path(folder / f"{_PREFIX}{first_user:010d}.safetensors") as path:
        save_file(tensors, path)


def is_written(folder: Path, first_user: int) -> bool:
    """Whether the unit that begins with this user is committed."""
    return (folder / f"{_PREFIX}{first_user:010d}.safetensors").exists()


class EmbeddingData:
    """Reads embeddings by user; the files are mapped, not loaded."""

    def __init__(self, folder: Path) -> None:
        self._paths = sorted(folder.glob(f"{_PREFIX}*.safetensors"))
        self._first = np.asarray([int(path.stem.removeprefix(_PREFIX)) for path in self._paths])
        self._unit = lru_cache(maxsize=256)(self._read)

    def _read(self, number: int) -> tuple[dict[str, Tensor], np.ndarray, np.ndarray]:
        """(tensors of a unit, where each user's items begin, where each user's questions begin)."""
        found = load_file(self._paths[number])
        starts = (np.concatenate([[0], np.cumsum(found[name].numpy())]) for name in ("num_items", "num_queries"))
        return found, *starts  # type: ignore[return-value]

    @property
    def embedding_size(self) -> int:
        """E."""
        return int(self._unit(0)[0]["keys"].shape[1])

    def has(self, user: int) -> bool:
        """Whether there is such a user, with history or without."""
        number = int(np.searchsorted(self._first, user, side="right")) - 1
        return number >= 0 and user - int(self._first[number]) < len(self._unit(number)[0]["num_items"])

    def user(self, user: int) -> UserEmbeddings:
        """All of one user's embeddings."""
        number = int(np.searchsorted(self._first, user, side="right")) - 1
        tensors, items, queries = self._unit(number)
        row = user - int(self._first[number])
        own, asked = slice(items[row], items[row + 1]), slice(queries[row], queries[row + 1])
        return UserEmbeddings(tensors["keys"][own], tensors["values"][own], tensors["queries"][asked])

    def means(self, users: np.ndarray) -> tuple[Tensor, Tensor]:
        """(mean of the keys [E], mean of the values [E]) over all items of the masked `users`; zero without any."""
        sums, num_items = torch.zeros(2, self.embedding_size, dtype=torch.float64), 0
        for number, first in enumerate(self._first):
            tensors, _, _ = self._unit(number)
            counts_U = tensors["num_items"].numpy()
            chosen_I = torch.from_numpy(np.repeat(users[first : first + len(counts_U)], counts_U))
            for row, name in enumerate(("keys", "values")):
                sums[row] += tensors[name][chosen_I].double().sum(0)
            num_items += int(chosen_I.sum())
        key_mean, value_mean = (sums / max(num_items, 1)).float()
        return key_mean, value_mean
