"""Checkpoints of a rank stage: a folder a step, a safetensors file a rank, committed by a marker that is written last.

    checkpoint/step-00000100-1f2e3d4c/rank-00000.safetensors rank-00001.safetensors .. checkpoint.json

The eight digits after the step are of this writing alone: a rank of an earlier gang that a cut left running writes to
a folder of its own. Tensors are whole (from the first rank) or in shards of rows (from all ranks), and are read back by
rows, so that nothing depends on the number of ranks, the expert-parallel size or the ZeRO stage. No pickles. Called by
`training/rank_stage.py`; `distributed/engine.py` restores from a `Checkpoint`.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from proper_ds.distributed.ranks import Ranks
from proper_ds.errors import FleetError, UserError
from proper_ds.files import atomic_path, digest_of_file, write_json_atomic

Tensor = torch.Tensor

MARKER = "checkpoint.json"
_MARKED = {"num_steps", "fingerprint", "about", "files", "shards"}
_NAMES = "step-*-*"
_ASIDE = "damaged-"
_WHOLE, _ROWS = "whole/", "rows/"
_WEIGHT = "weight/"


@dataclass(frozen=True)
class Shard:
    """What one rank holds of a tensor: rows `start`, `start + 1` .. of `num_rows`, along the first dimension."""

    name: str
    tensor: Tensor
    start: int
    num_rows: int


class Checkpoint:
    """What a stage needs to go on after `num_steps` finished optimizer steps; read when asked for.

    Attributes:
        about: what it was written under: `train_batch_size`, `num_ranks` and so on.
    """

    def __init__(self, folder: Path, marker: dict[str, Any]) -> None:
        self.num_steps, self.about = int(marker["num_steps"]), dict(marker["about"])
        self.folder, self.files = folder, marker["files"]
        self._shards = marker["shards"]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The whole tensors by name, on the CPU."""
        with safe_open(self.folder / self.files[0]["name"], "pt") as file:
            names = [key for key in file.keys() if key.startswith(_WHOLE)]  # noqa: SIM118 - it is no dictionary
            return {key.removeprefix(_WHOLE): file.get_tensor(key) for key in names}

    def weights(self) -> dict[str, Tensor]:
        """All trained weights, whole, on the CPU."""
        found = {name.removeprefix(_WEIGHT): t for name, t in self.tensors.items() if name.startswith(_WEIGHT)}
        for name, shard in self._shards.items():
            if name.startswith(_WEIGHT):
                found[name.removeprefix(_WEIGHT)] = self.rows(name, 0, shard["num_rows"])
        return found

    def num_rows(self, name: str) -> int:
        """Rows of a tensor that was saved in shards, over all ranks; 0 where there is none of this name."""
        return self._shards[name]["num_rows"] if name in self._shards else 0

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor that was saved in shards, on the CPU, whoever wrote them.

        `stop` may be `start`, for a rank that holds none: an empty tensor of the right width.
        """
        if start == stop:
            return self.rows(name, 0, 1)[:0]
        parts, here = [], start
        for first, last, number in self._shards[name]["parts"]:
            if first <= here < min(last, stop):
                with safe_open(self.folder / self.files[number]["name"], "pt") as file:
                    parts.append(file.get_slice(f"{_ROWS}{first}/{name}")[here - first : min(last, stop) - first])
                here = min(last, stop)
        assert parts and here == stop, f"{name} has no rows {here} to {stop}"
        return torch.cat(parts)

    def damage(self, number: int) -> str:
        """What is wrong with file `number`, or nothing."""
        path, wanted = self.folder / self.files[number]["name"], self.files[number]
        try:
            if path.stat().st_size != wanted["bytes"]:
                return f"{path} has {path.stat().st_size} bytes, not the {wanted['bytes']} that were written"
            return "" if _digest(path) == wanted["digest"] else f"{path} is not what was written (checksum)"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"


class Checkpoints:
    """The checkpoints of one stage in one folder that all ranks see.

    Args:
        fingerprint: of the stage's inputs; a checkpoint of other inputs is not used.
        save_total_limit: how many to keep, the newest.

    Attributes:
        warnings: what `latest` found damaged; on the first rank.
    """

    def __init__(self, folder: Path, fingerprint: str, save_total_limit: int) -> None:
        self.folder, self._fingerprint, self._limit = folder, fingerprint, save_total_limit
        self.warnings: list[str] = []

    def save(
        self, num_steps: int, whole: dict[str, Tensor], shards: Sequence[Shard], about: dict[str, Any], ranks: Ranks
    ) -> None:
        """Write and commit a checkpoint, then remove all but the newest few; a collective.

        Args:
            whole: tensors by name; those of the first rank are written.
            shards: this rank's; all ranks' together have every row, and rows that several have are equal.
        """
        ((token,), *_) = ranks.gather([secrets.randbits(32)])
        folder = self.folder / f"step-{num_steps:08d}-{token:08x}"
        tensors = {_WHOLE + name: _plain(value) for name, value in whole.items()} if ranks.is_first else {}
        tensors |= {f"{_ROWS}{shard.start}/{shard.name}": _plain(shard.tensor) for shard in shards if len(shard.tensor)}
        written = [0, 0]
        if tensors or ranks.is_first:
            with atomic_path(folder / _file_of(ranks.rank)) as path:
                save_file(tensors, path, {shard.name: str(shard.num_rows) for shard in shards})
                written = [path.stat().st_size, _digest(path)]
        found = ranks.gather(written)  # nobody is here before his file is
        if ranks.is_first:
            written_by_name = {_file_of(rank): each for rank, each in enumerate(found) if each[0]}
            self._commit(folder, num_steps, about, written_by_name)

    def _commit(self, folder: Path, num_steps: int, about: dict[str, Any], written: dict[str, list[int]]) -> None:
        """Write the marker, the last write. `written`: by name of file its bytes and digest."""
        marker = {
            "num_steps": num_steps,
            "fingerprint": self._fingerprint,
            "about": about,
            "files": [{"name": name, "bytes": size, "digest": digest} for name, (size, digest) in written.items()],
            "shards": _shards_in(folder, list(written)),
        }
        write_json_atomic(folder / MARKER, marker)
        for old in self._complete()[: -self._limit]:
            _remove(old)

    def latest(self, ranks: Ranks) -> Checkpoint | None:
        """The newest checkpoint of these inputs, or None where there is none; a collective.

        Half-written ones are removed. Every file's checksum is compared, by one of the ranks; a checkpoint with a
        damaged file is put aside, and the one before it taken; `warnings` tells.

        Raises:
            FleetError: where every checkpoint is damaged, now or at an earlier call; on the first rank, whose end is
                that of all.
            UserError: where this rank does not see the first rank's files.
        """
        if ranks.is_first:
            self._clear_up()
        while True:
            newest = self._complete()[-1:] if ranks.is_first else []  # the first rank says which
            num_steps, token = ranks.gather(_numbers(newest[0]) if newest else [-1, -1])[0]
            if num_steps < 0:
                break
            checkpoint = self._open(self.folder / f"step-{num_steps:08d}-{token:08x}")
            mine = range(ranks.rank, len(checkpoint.files), ranks.num_ranks)
            if not ranks.sum([float(any(checkpoint.damage(number) for number in mine))])[0]:
                return checkpoint
            if ranks.is_first:
                self._put_aside(checkpoint.folder)
        if ranks.is_first and (aside := self._all_aside()):
            what = "; ".join(damage for folder in aside for damage in _damages(folder))
            raise FleetError(f"no checkpoint is whole: {what}. Delete {self.folder} to start the stage over")
        return None

    def _clear_up(self) -> None:
        """Remove half-written checkpoints, and put those aside that do not even say of which inputs they are."""
        for path in list(self.folder.glob(_NAMES)):
            marker = _marker(path)
            if marker is None:
                _remove(path)
            elif not marker:
                self._put_aside(path)

    def _put_aside(self, folder: Path) -> None:
        """Keep a damaged checkpoint for people to look at, and so that no later start begins over unasked."""
        self.warnings += _damages(folder.rename(folder.with_name(_ASIDE + folder.name)))

    def _all_aside(self) -> list[Path]:
        """Folders of damaged checkpoints of these inputs, or of unknown ones."""
        found = sorted(self.folder.glob(_ASIDE + _NAMES))
        return [path for path in found if (_marker(path) or {}).get("fingerprint") in (self._fingerprint, None)]

    def _open(self, folder: Path) -> Checkpoint:
        if marker := _marker(folder):
            return Checkpoint(folder, marker)
        raise UserError(f"{folder} is not seen by all ranks; output_dir must be on storage that all nodes share")

    def newest_step(self) -> int:
        """Optimizer steps in the newest checkpoint of these inputs, 0 without; for whoever is no rank."""
        return _numbers(newest[0])[0] if (newest := self._complete()[-1:]) else 0

    def _complete(self) -> list[Path]:
        """Folders of complete checkpoints of these inputs, oldest first."""
        markers = {path: _marker(path) or {} for path in sorted(self.folder.glob(_NAMES))}
        return [path for path, marker in markers.items() if marker.get("fingerprint") == self._fingerprint]


def any_complete(folder: Path, ranks: Ranks) -> bool:
    """Whether a checkpoint in `folder` was ever completed, of any inputs and damaged or not; a collective.

    The first rank decides for all: storage that nodes share may show a file to some of them later than to others.
    """
    ((found,), *_) = ranks.gather([int(any(folder.glob(f"*/{MARKER}")))])
    return bool(found)


def _marker(folder: Path) -> dict[str, Any] | None:
    """A checkpoint's last write; None where it is not complete, or just being removed; empty where it is damaged."""
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:  # no JSON, or no UTF-8
        return {}
    return found if isinstance(found, dict) and found.keys() >= _MARKED else {}


def _damages(folder: Path) -> list[str]:
    """What is wrong with the files of a damaged checkpoint."""
    if not (marker := _marker(folder)):
        return [f"{folder / MARKER} is not what was written"]
    checkpoint = Checkpoint(folder, marker)
    return [damage for number in range(len(checkpoint.files)) if (damage := checkpoint.damage(number))]


def _file_of(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _numbers(folder: Path) -> list[int]:
    """The step and the token in a folder's name."""
    _, step, token = folder.name.split("-")
    return [int(step), int(token, 16)]


def _digest(path: Path) -> int:
    return int(digest_of_file(path)[:15], 16)  # 60 bits: a number that ranks can exchange


def _plain(value: Tensor) -> Tensor:
    """A tensor with memory of its own on the CPU, as safetensors wants it."""
    value = value.detach().cpu().contiguous()
    return value if value.untyped_storage().nbytes() == value.numel() * value.element_size() else value.clone()


def _shards_in(folder: Path, names: list[str]) -> dict[str, Any]:
    """By name of tensor its rows and where they are: [first row, one past the last, number of the file], by row."""
    found: dict[str, Any] = {}
    for number, file_name in enumerate(names):
        try:
            with safe_open(folder / file_name, "pt") as file:
                num_rows = file.metadata() or {}
                keys = [key for key in file.keys() if key.startswith(_ROWS)]  # noqa: SIM118 - it is no dictionary
                for key in keys:
                    _, start, name = key.split("/", 2)
                    entry = found.setdefault(name, {"num_rows": int(num_rows[name]), "parts": []})
                    length = file.get_slice(key).get_shape()[0]
                    entry["parts"].append([int(start), int(start) + length, number])
        except FileNotFoundError:
            raise UserError(
                f"{folder / file_name} was written by another rank and is not seen by the first; output_dir must be"
                " on storage that all nodes share"
            ) from None
    for name, entry in found.items():
        entry["parts"].sort()
        here = 0
        for first, last, _ in entry["parts"]:
            here = max(here, last) if first <= here else here
        assert here == entry["num_rows"], f"{name}: ranks gave no row {here} of {entry['num_rows']}"
    return found


def _remove(folder: Path) -> None:
    """Delete a checkpoint's folder, its marker first, so that a kill leaves a half-written one."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
