"""`proper-ds bench`: one command for each benchmark; the work is in `proper_ds/bench/`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Benchmarks, each against its rivals in the same run.")


@app.callback()
def _group() -> None:
    """Benchmarks, each against its rivals in the same run."""


@app.command()
def store(
    users: Annotated[int, typer.Option(min=256, help="Adapters to store.")] = 10_000,
    adapter_bytes: Annotated[int, typer.Option(min=10_000, help="Size of one, about.")] = 100_000,
    repeats: Annotated[int, typer.Option(min=1, help="How often everything is measured.")] = 3,
    scratch: Annotated[Path | None, typer.Option(help="A folder on the disk to measure.")] = None,
    json: Annotated[Path | None, typer.Option(help="Where to write the figures.")] = None,
) -> None:
    """The adapter store beside one PEFT directory per user."""
    from proper_ds.bench.store import run

    run(users, adapter_bytes, repeats, scratch, json)
