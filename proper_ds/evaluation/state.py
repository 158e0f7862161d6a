"""What must be kept of each user so that a method can answer: bytes, averaged over users with history, as only of these
anything is kept. `report.py` calls it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from proper_ds.evaluation.kept_texts import floor_bytes, recipe_bytes
from proper_ds.evaluation.methods import Method
from proper_ds.evaluation.prior_fit import tasks_with_prior
from proper_ds.model.lora import LoraLayout
from proper_ds.store.elsewhere import open_store

if TYPE_CHECKING:
    from proper_ds.training.context import RunContext

_FLOAT_BYTES = 4


def bytes_per_user(context: RunContext, method: Method) -> float:
    """Bytes a user of a method's state: adapter, vectors, and of the history what its prompts or counts need.

    What all users share is not counted.
    """
    context, total = replace(context, lane=method.lane), 0.0
    manifest = context.prepared.manifest
    num_users = max(1, manifest.num_users - manifest.num_empty - manifest.num_cold_users)
    if method.kind == "floor":
        return floor_bytes(context.prepared, method.name)
    if method.kind == "merged":
        return float(_FLOAT_BYTES * 2 * context.hidden_size)  # mean features of the history; the adapters are others'
    if method.kind == "PLoRA":
        return float(_FLOAT_BYTES * context.config.plora.user_vector_size)
    if method.pplug is not None:
        total += _embedding_bytes(context.stage("embeddings").path) / num_users
    if method.adapter_set is not None:  # those trained on together with a router take as much room
        store = open_store(context.stage(f"store/{method.adapter_set}").path)
        num_adapters = len(store.users())
        total += store.stats().pack_bytes / num_adapters if num_adapters else 0.0
    if method.preset is not None:
        total += _vector_bytes(context.stage(method.level_stage).path / "level.safetensors")
    if method.prior:
        total += _FLOAT_BYTES * sum(len(labels) for labels in tasks_with_prior(context.prepared).values())
    if not method.recipe.is_plain:
        total += recipe_bytes(context, method.recipe)
    return total


def _vector_bytes(level: Path) -> int:
    """Bytes of a user's vector in a group level's file; none where gates follow from the user's LoRA alone."""
    with safe_open(level, "pt") as file:
        about = json.loads(file.metadata()["group_level"])
    preset, sizes = about["preset"], about["sizes"]
    if about["lora_aware"] and preset["lora_gate"] != "residual":
        return 0
    if preset["gate"] == "summed":
        return _FLOAT_BYTES * int(sizes["user_vector_size"])
    return _FLOAT_BYTES * sum(shape.in_features for shape in LoraLayout.from_json(about["layout"]).modules)


def _embedding_bytes(folder: Path) -> int:
    """Bytes of all users' embedded history; those of the questions come with the questions."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in ("keys", "values"):
                rows, width = file.get_slice(name).get_shape()
                total += _FLOAT_BYTES * rows * width
    return total
