"""Adapters as PEFT directories: our rows to `adapter_config.json` and `adapter_model.safetensors`, and back.

Keys and fields follow PEFT 0.21 (docs, developer guide "checkpoint"); nothing here needs the network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from proper_ds.errors import AdapterError
from proper_ds.files import atomic_path, write_json_atomic
from proper_ds.model.lora import LoraLayout, ModuleShape

Tensor = torch.Tensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


def check_row(row_P: Tensor, layout: LoraLayout, what: str) -> None:
    """Raise AdapterError for an adapter that is the wrong size, not finite, or without any effect (B = 0)."""
    if row_P.numel() != layout.num_parameters:
        raise AdapterError(f"{what}: has {row_P.numel()} numbers where its layout needs {layout.num_parameters}")
    if not bool(row_P.isfinite().all()):
        raise AdapterError(f"{what}: has weights that are not finite")
    if not layout.has_effect(row_P):
        raise AdapterError(f"{what}: every lora_B is zero, so it has no effect")


def peft_config(layout: LoraLayout, target_modules: list[str], dropout: float, base: str, revision: str | None) -> dict:
    """The contents of `adapter_config.json`."""
    import peft

    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": layout.r,
        "lora_alpha": layout.lora_alpha,
        "lora_dropout": dropout,
        "target_modules": list(target_modules),
        "layers_to_transform": layout.layers or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "peft_version": peft.__version__,
    }


def save_peft(folder: Path, row_P: Tensor, layout: LoraLayout, config: dict[str, Any]) -> None:
    """Write one adapter as a PEFT directory; the configuration is the last write.

    Raises:
        AdapterError: see `check_row`.
    """
    check_row(row_P, layout, str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, a_SrD, b_SEr in layout.views(row_P.unsqueeze(0)):
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a_SrD[0].contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b_SEr[0].contiguous()
    with atomic_path(folder / WEIGHTS) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    write_json_atomic(folder / CONFIG, config)


def load_peft(folder: Path) -> tuple[Tensor, LoraLayout]:
    """One adapter [P] and its layout from a PEFT directory.

    Raises:
        AdapterError: where a file is missing, or it is no plain LoRA of one rank.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder} is no PEFT directory ({error})") from None
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("use_rslora"):
        raise AdapterError(f"{folder}: only plain LoRA is supported, its peft_type is {config.get('peft_type')}")
    names = [key[len(_PREFIX) : -len(".lora_A.weight")] for key in tensors if key.endswith(".lora_A.weight")]
    names.sort(key=_natural)
    shapes, rows = [], []
    for name in names:
        a_rD, b_Er = tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"]
        if a_rD.shape[0] != config["r"]:
            raise AdapterError(f"{folder}: {name} has rank {a_rD.shape[0]}, its configuration says {config['r']}")
        shapes.append(ModuleShape(name, a_rD.shape[1], b_Er.shape[0]))
        rows += [a_rD.flatten(), b_Er.flatten()]
    return torch.cat(rows), LoraLayout(tuple(shapes), config["r"], config["lora_alpha"])


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
