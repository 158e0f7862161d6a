"""Fills the "auto" values of a plain DeepSpeed JSON from a stage's section; refuses contradictions.

Pure: called by the configuration checks before anything starts, and by the engine on every rank.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from proper_ds.errors import Problem
from proper_ds.training.config import RankTraining

REFUSED = {
    "scheduler": "The schedule comes from `lr_scheduler_type`; remove it from the DeepSpeed file.",
    "fp16": "Use `base.dtype: bfloat16` or `float32`; remove it from the DeepSpeed file.",
    "curriculum_learning": "proper_ds orders the data itself; remove it from the DeepSpeed file.",
}


def read_ds_file(path: str) -> dict[str, Any]:
    """The DeepSpeed file's contents. Raises OSError or ValueError."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("holds no JSON object")
    return found


def _wanted(stage: RankTraining, num_ranks: int, bf16: bool) -> dict[str, Any]:
    accumulation = stage.num_micro_batches(num_ranks)
    return {
        "train_micro_batch_size_per_gpu": stage.per_device_train_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": stage.per_device_train_batch_size * accumulation * num_ranks,
        "gradient_clipping": stage.max_grad_norm,
        "bf16.enabled": bf16,
        "optimizer.params.lr": stage.learning_rate,
        "optimizer.params.betas": [stage.adam_beta1, stage.adam_beta2],
        "optimizer.params.eps": stage.adam_epsilon,
        "optimizer.params.weight_decay": stage.weight_decay,
    }


def resolve_ds(
    raw: dict[str, Any], stage_name: str, stage: RankTraining, num_ranks: int, bf16: bool
) -> tuple[dict[str, Any], list[Problem]]:
    """The DeepSpeed configuration of one stage, and what contradicts the run's YAML.

    Args:
        raw: the DeepSpeed file's contents; "auto" and absent values are taken from `stage`.
        stage_name: the stage's section, for messages.
        stage: batch size, learning rate and so on.
        num_ranks: data-parallel ranks.
        bf16: whether the engine trains in bfloat16.
    """
    resolved = copy.deepcopy(raw)
    problems = [
        Problem(f"distributed.deepspeed:{key}", "is not supported", mend) for key, mend in REFUSED.items() if key in raw
    ]
    optimizer = resolved.setdefault("optimizer", {"type": "AdamW", "params": {"torch_adam": True}})
    if optimizer.get("type") not in ("Adam", "AdamW"):
        wrong = f"{optimizer.get('type')!r} is not supported"
        problems.append(Problem("distributed.deepspeed:optimizer.type", wrong, "Use AdamW, or leave it out."))
    for dotted, value in _wanted(stage, num_ranks, bf16).items():
        *sections, key = dotted.split(".")
        inner = resolved
        for section in sections:
            inner = inner.setdefault(section, {})
        given = inner.get(key, "auto")
        if given != "auto" and given != value:
            problems.append(
                Problem(
                    f"distributed.deepspeed:{dotted}",
                    f"is {given!r}, but section `{stage_name}` makes it {value!r}",
                    'Write "auto" there, or make the two agree.',
                )
            )
        inner[key] = value
    return resolved, problems


def zero_stage(raw: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration (0 where none is given)."""
    return int(raw.get("zero_optimization", {}).get("stage", 0))


def offloads_optimizer(raw: dict[str, Any]) -> bool:
    """Whether optimizer states live on the CPU."""
    device = raw.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    return bool(device not in ("none", None))
