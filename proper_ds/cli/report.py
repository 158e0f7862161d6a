"""`proper-ds report verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proper_ds.errors import DataError

MAX_SHOWN = 20

app = typer.Typer(no_args_is_help=True, help="Look into the report of a run.")


@app.callback()
def _group() -> None:
    """Keeps `verify` a command of its own while it is the only one."""


@app.command()
def verify(run: Annotated[Path, typer.Argument(help="The folder of a run with its report.")]) -> None:
    """Compute every score of a report again from the files of predictions it names; exit code 2 where one differs."""
    from proper_ds.evaluation.verify import verify as verify_report

    found = verify_report(run)
    for line in found.problems[:MAX_SHOWN]:
        typer.echo(line)
    if len(found.problems) > MAX_SHOWN:
        typer.echo(f"... and {len(found.problems) - MAX_SHOWN} more")
    if found.problems:
        raise DataError(f"{run}: the report does not follow from its predictions; make it again, or ask who changed it")
    typer.echo(
        f"{found.num_numbers} numbers of {run / 'report.json'} follow from {found.num_files} files of predictions"
    )
