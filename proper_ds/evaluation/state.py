"""What must be kept of each user so that a method can answer: bytes, averaged over the users. `report.py` calls it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from proper_ds.evaluation.methods import Method
from proper_ds.model.lora import LoraLayout
from proper_ds.store.elsewhere import open_store

if TYPE_CHECKING:
    from proper_ds.training.context import RunContext

_FLOAT_BYTES = 4


def bytes_per_user(context: RunContext, method: Method) -> float:
    """Bytes a user of a method: the adapter as stored, and the user vector where gates depend on one."""
    context, total = replace(context, lane=method.lane), 0.0
    if method.own_set is not None:
        store = open_store(context.stage(f"store/{method.own_set}").path)
        num_users = len(store.users())
        total += store.stats().pack_bytes / num_users if num_users else 0.0
    if method.preset is not None:
        total += _vector_bytes(context.stage(method.level_stage).path / "level.safetensors")
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
