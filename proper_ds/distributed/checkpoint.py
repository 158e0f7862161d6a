"""Checkpoints of a rank stage: one safetensors file of what trains, committed by a JSON marker that is written last.

Written by rank 0 to storage that all ranks see; no pickles, and no dependence on ranks or ZeRO stage.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from proper_ds.files import atomic_path, write_json_atomic

Tensor = torch.Tensor

MARKER = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a stage needs to go on after `num_steps` finished optimizer steps."""

    num_steps: int
    tensors: dict[str, Tensor]


class Checkpoints:
    """The checkpoints of one stage in one folder; the newest is kept.

    Args:
        fingerprint: of the stage's inputs; a checkpoint of other inputs is not used.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self._fingerprint = folder, fingerprint

    def save(self, num_steps: int, tensors: dict[str, Tensor]) -> None:
        """Commit a checkpoint, then remove the one before it. Rank 0 only."""
        name = f"step-{num_steps:08d}.safetensors"
        with atomic_path(self.folder / name) as path:
            save_file({key: value.contiguous() for key, value in tensors.items()}, path)
        marker = {"num_steps": num_steps, "file": name, "fingerprint": self._fingerprint}
        write_json_atomic(self.folder / MARKER, marker)
        for old in self.folder.glob("step-*.safetensors"):
            if old.name != name:
                old.unlink()

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint of these inputs, or None."""
        try:
            marker = json.loads((self.folder / MARKER).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        if marker["fingerprint"] != self._fingerprint:
            return None
        return Checkpoint(int(marker["num_steps"]), load_file(self.folder / marker["file"]))
