"""`proper-ds bench`: one command for each benchmark; the work is in `proper_ds/bench/`."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, help="Benchmarks, each against its rivals in the same run.")


@app.callback()
def _group() -> None:
    """Benchmarks, each against its rivals in the same run."""
