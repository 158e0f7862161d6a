"""Group experts as PEFT directories, one each; written by the group stage and by `proper-ds experts`.

An expert by itself is an ordinary LoRA on the base with the population adapter merged. What users get is the mixture
of all, by gates that depend on token and user, which no PEFT directory can hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from proper_ds.errors import AdapterError
from proper_ds.model.adapter_file import peft_config, save_peft
from proper_ds.model.gate_stats import likeness
from proper_ds.model.groups import GroupLevel

EXPERTS = "experts"
MAX_WRITTEN = 64
"""The group stage writes the experts where there are at most so many."""


def write_experts(
    level: GroupLevel, folder: Path, chosen: Sequence[int], base: str, revision: str | None = None
) -> list[int]:
    """Write the chosen experts below `folder` as `expert-0000` and so on; returns those without effect, left out.

    `lora_alpha` carries the preset's factor 1/N where it has one: a directory is what its expert adds at gate 1.

    Raises:
        AdapterError: where weights are not finite, or none of the chosen has any effect.
    """
    assert chosen, "no expert was chosen"
    factor = 1 / level.num_experts if level.preset.divide_by_experts else 1.0
    layout = replace(level.layout, lora_alpha=level.layout.lora_alpha * factor)
    modules = sorted({module.name.rsplit(".", 1)[-1] for module in layout.modules})
    config = peft_config(layout, modules, 0.0, base, revision)
    experts, idle = level.expert_weights(), list[int]()
    for number in chosen:
        row_P = torch.cat([part[number].flatten() for pair in experts for part in pair]).float().cpu()
        if not bool(row_P.isfinite().all()):
            raise AdapterError(f"expert {number} of {level.num_experts} has weights that are not finite")
        if not likeness(experts, [number])[0, 0]:  # B_i A_i may be zero though neither A_i nor B_i is
            idle.append(number)
            continue
        save_peft(folder / f"expert-{number:04d}", row_P, layout, config)
    if len(idle) == len(chosen):
        raise AdapterError(
            f"no expert has any effect: B A is zero in all {len(idle)}; raise group.learning_rate or train longer"
        )
    return idle
