"""Fills the "auto" values of a plain DeepSpeed JSON from a stage's section; refuses contradictions.

Pure: called by the configuration checks before anything starts, and by the engine on every rank.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from proper_ds.distributed.ds_keys import KEY, STAGE_3, TOP, unknown_keys
from proper_ds.errors import Problem
from proper_ds.training.config import RankTraining

FROM_HIDDEN_SIZE = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")


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
    raw: dict[str, Any],
    stage_name: str,
    stage: RankTraining,
    num_ranks: int,
    bf16: bool,
    hidden_size: int | None = None,
) -> tuple[dict[str, Any], list[Problem]]:
    """The DeepSpeed configuration of one stage, and what contradicts the run's YAML, itself, or DeepSpeed.

    Args:
        raw: the DeepSpeed file's contents; "auto" and absent values are taken from `stage`.
        stage_name: the stage's section, for messages.
        stage: batch size, learning rate and so on.
        num_ranks: data-parallel ranks.
        bf16: whether the engine trains in bfloat16.
        hidden_size: of the base, from which sizes of buffers marked "auto" come; None leaves those as they are, before
            there is a base to look at.
    """
    problems = unknown_keys(raw)
    resolved = {key: copy.deepcopy(raw[key]) for key in TOP if key in raw}
    if any(problem.wrong.endswith("no section") for problem in problems):
        return resolved, problems
    optimizer = resolved.setdefault("optimizer", {"type": "AdamW", "params": {"torch_adam": True}})
    if optimizer.get("type") not in ("Adam", "AdamW"):
        wrong = f"{optimizer.get('type')!r} is not supported"
        problems.append(Problem(f"{KEY}:optimizer.type", wrong, "Use AdamW, or leave it out."))
    for dotted, value in _wanted(stage, num_ranks, bf16).items():
        *sections, key = dotted.split(".")
        inner = resolved
        for section in sections:
            inner = inner.setdefault(section, {})
        given = inner.get(key, "auto")
        if given != "auto" and given != value:
            problems.append(
                Problem(
                    f"{KEY}:{dotted}",
                    f"is {given!r}, but {_origin(dotted, stage_name)} makes it {value!r}",
                    'Write "auto" there, or make the two agree.',
                )
            )
        inner[key] = value
    zero = resolved.get("zero_optimization", {})
    problems += _zero_problems(zero, bf16)
    if hidden_size is not None:
        _fill_sizes(zero, hidden_size)
    problems += _left_over(resolved, hidden_size is None)
    return resolved, problems


def _origin(dotted: str, stage_name: str) -> str:
    return "base.dtype" if dotted == "bf16.enabled" else f"section `{stage_name}`"


def _zero_problems(zero: dict[str, Any], bf16: bool) -> list[Problem]:
    """What contradicts the ZeRO stage."""
    stage, prefix, problems = zero.get("stage", 0), f"{KEY}:zero_optimization", []
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        return [Problem(f"{prefix}.stage", f"is {stage!r}", "Use 0, 1, 2 or 3.")]
    if stage == 0 and bf16:
        wrong = "is 0, where DeepSpeed has no fp32 moments for what trains in bfloat16"
        problems.append(Problem(f"{prefix}.stage", wrong, "Use 1, which needs no more memory, or base.dtype=float32."))
    idle = (set(zero) & STAGE_3 if stage < 3 else set()) | (set(zero) - {"stage"} if stage == 0 else set())
    for key in sorted(idle):
        wrong, needs = f"has no effect at ZeRO stage {stage}", "3" if key in STAGE_3 else "1, 2 or 3"
        problems.append(Problem(f"{prefix}.{key}", wrong, f"Remove it, or use stage {needs}."))
    for key in ("offload_param", "offload_optimizer"):
        section = zero.get(key)
        if section is None or key in idle:
            continue
        device = section.get("device", "none") if isinstance(section, dict) else section
        if device not in ("none", "cpu", "nvme"):
            problems.append(Problem(f"{prefix}.{key}", f"has device {device!r}", "Legal are none, cpu and nvme."))
        elif device == "nvme" and "nvme_path" not in section:
            mend = "Give the folder of a local NVMe disk."
            problems.append(Problem(f"{prefix}.{key}.nvme_path", "not set, and device is nvme", mend))
        elif device == "nvme" and stage < 3:
            problems.append(Problem(f"{prefix}.{key}", "has device nvme, which ZeRO 3 alone knows", "Use cpu."))
    return problems


def _fill_sizes(zero: dict[str, Any], hidden_size: int) -> None:
    """What Hugging Face's Trainer writes for "auto"."""
    sizes = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for key, value in sizes.items():
        if zero.get(key) == "auto":
            zero[key] = value


def _left_over(section: dict[str, Any], before_base: bool, prefix: str = "") -> list[Problem]:
    """A problem for each "auto" that nothing here knows a value for."""
    problems = []
    for key, value in section.items():
        if isinstance(value, dict):
            problems += _left_over(value, before_base, f"{prefix}{key}.")
        elif value == "auto" and not (before_base and key in FROM_HIDDEN_SIZE):
            problems.append(Problem(f"{KEY}:{prefix}{key}", 'is "auto", which nothing decides', "Give a value."))
    return problems


def zero_stage(raw: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration (0 where none is given)."""
    section = raw.get("zero_optimization", {})
    return int(section.get("stage", 0)) if isinstance(section, dict) else 0


def offloads_optimizer(raw: dict[str, Any]) -> bool:
    """Whether optimizer states live on the CPU."""
    device = raw.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    return bool(device not in ("none", None))


def said_of_optimizer(raw: dict[str, Any]) -> dict[str, Any]:
    """What a DeepSpeed file decides itself of what is learned: the optimizer's values but "auto" ones, and its type."""
    section = raw.get("optimizer", {})
    params = {key: value for key, value in section.get("params", {}).items() if value not in ("auto", None)}
    return {"type": section.get("type", "AdamW"), "params": {k: v for k, v in params.items() if k != "torch_adam"}}
