"""`proper-ds bench`: one command for each benchmark; the work is in `proper_ds/bench/`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Benchmarks, each against its rivals in the same run.")

Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]
NumActors = Annotated[int | None, typer.Option(min=1, help="Actors; by default as many as fit.")]
Where = Annotated[
    Path | None, typer.Option(help="Where to write, by default the temporary folder; on a cluster, shared.")
]


@app.callback()
def _group() -> None:
    """Benchmarks, each against its rivals in the same run."""


@app.command("control-plane")
def control_plane(
    users: Annotated[int, typer.Option(min=1000, help="Made-up users.")] = 1_000_000,
    num_actors: NumActors = None,
    folder: Where = None,
    json_file: Json = None,
) -> None:
    """Plan, dispatch, commit and catalog with a kernel that does no training; stopped half-way and resumed."""
    from proper_ds.bench.control_plane import bench

    with tempfile.TemporaryDirectory(prefix="control-plane-", dir=folder) as empty:
        bench(users, num_actors or "auto", Path(empty), json_file)
