"""`proper-ds compare` and `proper-ds sweep`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from proper_ds.cli.run import LOG_WIDTH, Overrides
from proper_ds.observe.progress import ProgressView
from proper_ds.study.load import load_study, load_sweep


def compare(
    yaml: Annotated[Path, typer.Argument(help="The study's YAML.")],
    overrides: Overrides = None,
    again: Annotated[bool, typer.Option("--again", help="Read test users for another configuration, too.")] = False,
) -> None:
    """Run tasks x variants x seeds, each a normal run, and put them into one table."""
    study = load_study(yaml, overrides or ())
    from proper_ds.study.plan import plan_runs
    from proper_ds.study.runner import compare as run_study

    view = ProgressView(console())
    run_study(study, plan_runs(study, str(yaml)), view, again)


def sweep(
    yaml: Annotated[Path, typer.Argument(help="The sweep's YAML.")],
    overrides: Overrides = None,
) -> None:
    """Try values of a run's configuration on dev users and write down the best."""
    config = load_sweep(yaml, overrides or ())
    from proper_ds.study.sweep import BEST
    from proper_ds.study.sweep import sweep as run_sweep
    from proper_ds.study.trials import plan_trials

    trial, score = run_sweep(config, plan_trials(config, str(yaml)), ProgressView(console()))
    typer.echo(f"best of {config.objective.split}: {score.metric} of {score.method} {score.value:.4f}")
    for key, value in trial.overrides.items():
        typer.echo(f"  {key}: {value}")
    typer.echo(f"{Path(config.output_dir) / BEST}, for `chosen_by` of the run that takes it")


def console() -> Console:
    """A terminal's, or one of a file's width."""
    found = Console()
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = LOG_WIDTH
    return found
