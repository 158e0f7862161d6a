"""`proper-ds plan`: time, GPU-hours, storage and network of a fleet of users; the sums are in `bench/capacity.py`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from proper_ds.errors import UserError


def plan(
    users: Annotated[float, typer.Option(help="Users to train, such as 1e6.")],
    base_params: Annotated[float, typer.Option(help="Parameters of the base, such as 8e9.")],
    hardware: Annotated[str, typer.Option(help="h200, h100, a100, l40s; cpu with --measured.")] = "h200",
    num_gpus: Annotated[int, typer.Option(min=1, help="Devices, one actor each.")] = 1,
    items_per_user: Annotated[float, typer.Option(min=1, help="Items of a user's history.")] = 8,
    tokens_per_item: Annotated[float, typer.Option(min=1, help="Tokens of an item, prefix and answer included.")] = 96,
    prefix_tokens: Annotated[float, typer.Option(min=0, help="Of these, shared by all items of a user.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs over a user's history.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Items in one step of a user.")] = 4,
    rank: Annotated[int, typer.Option(min=1, help="Rank of an adapter.")] = 4,
    targets: Annotated[str, typer.Option(help="Adapted modules, comma-separated.")] = "gate_proj,up_proj,down_proj",
    dtype: Annotated[str, typer.Option(help="Stored as float32, bfloat16 or int8.")] = "bfloat16",
    sets: Annotated[int, typer.Option(min=1, max=3, help="Adapters of a user: OPPU, proper, proper-released.")] = 1,
    mfu: Annotated[float | None, typer.Option(help="Assumed share of the device's FLOP/s; 0.5 by default.")] = None,
    measured: Annotated[Path | None, typer.Option(help="JSON of a benchmark whose rate to use instead.")] = None,
) -> None:
    """What training a fleet of users will take, and what each figure rests on."""
    from proper_ds.bench.capacity import Demand, estimate, read_measured

    _check_finite(
        users=users,
        base_params=base_params,
        items_per_user=items_per_user,
        tokens_per_item=tokens_per_item,
        prefix_tokens=prefix_tokens,
        mfu=mfu,
    )
    demand = Demand(
        num_users=int(users),
        base_params=base_params,
        items_per_user=items_per_user,
        tokens_per_item=tokens_per_item,
        prefix_tokens=prefix_tokens,
        num_epochs=epochs,
        batch_size=batch_size,
        r=rank,
        targets=tuple(target.strip() for target in targets.split(",") if target.strip()),
        dtype=dtype,
        num_sets=sets,
    )
    lines = estimate(demand, hardware, num_gpus, mfu, read_measured(measured) if measured else None)
    table = Table(title=f"{users:,.0f} users, a base of {base_params:.3g} parameters", title_justify="left")
    for column in ("", "", "rests on"):
        table.add_column(column, overflow="fold")
    for line in lines:
        table.add_row(line.what, line.value, line.basis)
    Console().print(table)


def _check_finite(**given: float | None) -> None:
    for name, value in given.items():
        if value is not None and not math.isfinite(value):
            raise UserError(f"--{name.replace('_', '-')} {value} is no amount; give a finite number, such as 1e6")
