"""`proper-ds experts`: group experts of a run as PEFT directories."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proper_ds.errors import AdapterError
from proper_ds.run_folder import base_under


def experts(
    numbers: Annotated[list[int] | None, typer.Argument(help="Which experts, from 0; all unless given.")] = None,
    run: Annotated[Path, typer.Option(help="The run's folder.")] = Path(),
    preset: Annotated[str, typer.Option(help="proper or proper-released, or NAME@LANE.")] = "proper",
    out: Annotated[Path, typer.Option(help="Where to write; one folder an expert.")] = Path("experts"),
) -> None:
    """Write group experts as PEFT directories, for the base with `population/adapter` merged in (of a lane, its own).

    The group stage does so itself where there are at most 64.
    """
    from proper_ds.model.expert_files import write_experts
    from proper_ds.model.groups import GroupLevel

    path = run / "group" / preset / "level.safetensors"
    if not path.exists():
        held = ", ".join(sorted(found.parent.name for found in run.glob("group/*/level.safetensors"))) or "none"
        raise AdapterError(f"--run {run} has no group level {preset!r}; it has {held}")
    level = GroupLevel.load(path)
    chosen = list(numbers) if numbers else list(range(level.num_experts))
    wrong = [number for number in chosen if not 0 <= number < level.num_experts]
    if wrong:
        raise AdapterError(f"there is no expert {wrong[0]}: {preset} has 0 to {level.num_experts - 1}")
    base, revision = base_under(run, preset)
    idle = write_experts(level, out, chosen, base, revision)
    for number in idle:
        typer.echo(f"expert {number} has no effect and is not written")
    typer.echo(f"{len(chosen) - len(idle)} experts of {level.layout.num_parameters:,} numbers each: {out}")
