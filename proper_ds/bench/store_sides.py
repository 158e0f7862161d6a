"""The two sides of `bench store`: the same adapters in a store and in PEFT directories, written and read."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from proper_ds.files import sync_folder
from proper_ds.model.adapter_file import CONFIG, WEIGHTS
from proper_ds.model.lora import LoraLayout
from proper_ds.store.store import AdapterStore

Tensor = torch.Tensor

USERS_PER_UNIT = 1000


@dataclass
class Adapters:
    """Everybody's adapter, without keeping them all. Shapes: N distinct adapters, P numbers each.

    Attributes:
        rows_NP: users beyond N get the same ones again.
        about: the contents of `adapter_config.json`.
    """

    layout: LoraLayout
    rows_NP: Tensor
    about: dict[str, Any]

    def row_of(self, number: int) -> Tensor:
        """A user's adapter [P]."""
        return self.rows_NP[number % len(self.rows_NP)]


class StoreSide:
    """The store."""

    def __init__(self, folder: Path, adapters: Adapters) -> None:
        self._adapters = adapters
        self.folder = folder
        self.store = AdapterStore(folder)

    def write(self, num_users: int, dtype: str = "float32") -> None:
        """Put the first users, in units."""
        for first in range(0, num_users, USERS_PER_UNIT):
            numbers = range(first, min(num_users, first + USERS_PER_UNIT))
            adapters = {f"user-{number}": self._adapters.row_of(number) for number in numbers}
            losses = dict.fromkeys(adapters, (20, [2.0, 1.0]))
            self.store.put_unit(f"unit-{first:010d}", adapters, {}, losses, self._adapters.layout, dtype)

    def read(self, number: int) -> Tensor:
        """One user's adapter [P]."""
        return self.store.get(f"user-{number}")

    def read_batch(self, numbers: list[int]) -> Tensor:
        """Stacked adapters [N, P]."""
        return self.store.get_many([f"user-{number}" for number in numbers])

    def files_of(self, number: int) -> list[Path]:
        """What a read of this user may touch."""
        return list((self.folder / "packs").iterdir())


class DirectorySide:
    """One PEFT directory per user, written by hand: the two files without PEFT's README."""

    def __init__(self, folder: Path, adapters: Adapters, synced: bool) -> None:
        self.folder, self._adapters, self._synced = folder, adapters, synced

    def write(self, num_users: int) -> None:
        """Write the first users."""
        for number in range(num_users):
            target = self.folder / f"user-{number}"
            target.mkdir(parents=True)
            tensors = {}
            for name, a_SrD, b_SEr in self._adapters.layout.views(self._adapters.row_of(number).unsqueeze(0)):
                tensors[f"base_model.model.{name}.lora_A.weight"] = a_SrD[0]
                tensors[f"base_model.model.{name}.lora_B.weight"] = b_SEr[0]
            save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
            (target / CONFIG).write_text(json.dumps(self._adapters.about))
            if self._synced:
                sync_files(target)

    def read(self, number: int) -> dict[str, Tensor]:
        """One user's tensors by name."""
        folder = self.folder / f"user-{number}"
        json.loads((folder / CONFIG).read_text())
        return load_file(folder / WEIGHTS)

    def read_batch(self, numbers: list[int]) -> list[Tensor]:
        """Stacked tensors [N, ...], one for each name."""
        found = [self.read(number) for number in numbers]
        return [torch.stack([tensors[name] for tensors in found]) for name in found[0]]

    def files_of(self, number: int) -> list[Path]:
        """What a read of this user touches."""
        return list((self.folder / f"user-{number}").iterdir())


def sync_files(folder: Path) -> None:
    """Make a folder and the files in it durable."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
    sync_folder(folder.parent)


def read_seconds(side: StoreSide | DirectorySide, numbers: list[int], cold: bool) -> list[float]:
    """Seconds of reading each of these users, from the disk where `cold`, from the page cache otherwise."""
    seconds = []
    for number in numbers:
        if cold:
            _drop_from_cache(side.files_of(number))
        else:
            side.read(number)
        seconds.append(seconds_of(lambda number=number: side.read(number)))  # type: ignore[misc]
    return seconds


def _drop_from_cache(paths: list[Path]) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def some_of(num_users: int, num: int) -> list[int]:
    """Different users at random."""
    return random.sample(range(num_users), min(num, num_users))


def seconds_of(what: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start_s = time.perf_counter()
    what()
    return time.perf_counter() - start_s
