"""A module's weights in one safetensors file that also says how to rebuild the module; for shared parts of methods."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from proper_ds.errors import AdapterError
from proper_ds.files import atomic_path

Tensor = torch.Tensor


def save_weights(path: Path, tensors: Mapping[str, Tensor], kind: str, about: dict[str, Any], section: str) -> None:
    """Write weights in fp32, all or nothing. Raises AdapterError where one is not finite.

    Args:
        kind: what they belong to, such as `group_level`; readers ask for it.
        about: what is needed to rebuild the module besides its weights.
        section: of the stage that trained them, for the message.
    """
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in tensors.items()}
    bad = [name for name, value in tensors.items() if not value.isfinite().all()]
    if bad:
        what = kind.replace("_", " ")
        raise AdapterError(f"{what}: weights are not finite in {bad[0]}; lower {section}.learning_rate")
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={kind: json.dumps(about)})


def read_about(path: Path, kind: str) -> dict[str, Any]:
    """What a file's weights are rebuilt from; reads no weights."""
    with safe_open(path, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()[kind])
    return found
