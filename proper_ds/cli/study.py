"""`proper-ds compare` and `proper-ds sweep`."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from proper_ds.cli.run import LOG_WIDTH, Overrides
from proper_ds.observe.progress import ProgressView
from proper_ds.study.load import load_study, load_sweep

DryRun = Annotated[bool, typer.Option("--dry-run", help="Check all configurations and list them; run nothing.")]


def compare(
    yaml: Annotated[Path, typer.Argument(help="The study's YAML.")],
    overrides: Overrides = None,
    again: Annotated[bool, typer.Option("--again", help="Read test users for another configuration, too.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Run tasks x variants x seeds, each a normal run, and put them into one table."""
    study = load_study(yaml, overrides or ())
    from proper_ds.study.plan import plan_runs
    from proper_ds.study.runner import check_test_reads, raise_for
    from proper_ds.study.runner import compare as run_study

    planned, shown = plan_runs(study, str(yaml)), console()
    if not again:
        check_test_reads(planned)
    if dry_run:
        _list("runs", [(run.name, run.config.output_path) for run in planned])
        return
    command = shlex.join(["proper-ds", "compare", str(yaml), *(overrides or ()), *(["--again"] if again else [])])
    finished, failures = run_study(study, planned, ProgressView(shown), again, command)
    for run in finished:
        typer.echo(f"{run.name}: {run.seconds:.0f} s of work in its stages, configuration {run.config_hash[:8]}")
    if finished:
        show_tables(Path(study.output_dir), shown)
    raise_for(failures, len(planned))


def sweep(
    yaml: Annotated[Path, typer.Argument(help="The sweep's YAML.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Try values of a run's configuration on dev users and write down the best."""
    config = load_sweep(yaml, overrides or ())
    from proper_ds.study.sweep import BEST
    from proper_ds.study.sweep import sweep as run_sweep
    from proper_ds.study.trials import plan_trials

    trials = plan_trials(config, str(yaml))
    if dry_run:
        _list("trials", [(trial.name, ", ".join(f"{k}={v}" for k, v in trial.overrides.items())) for trial in trials])
        return
    trial, score = run_sweep(config, trials, ProgressView(console()))
    typer.echo(f"best of {config.objective.split}: {score.metric} of {score.method} {score.value:.4f}")
    for key, value in trial.overrides.items():
        typer.echo(f"  {key}: {value}")
    typer.echo(f"{Path(config.output_dir) / BEST}, for `chosen_by` of the run that takes it")


def _list(what: str, rows: Sequence[tuple[str, object]]) -> None:
    for name, about in rows:
        typer.echo(f"{name}: {about}")
    typer.echo(f"{len(rows)} {what}, all of them legal; nothing was run")


def show_tables(folder: Path, shown: Console) -> None:
    """Print the scores of all users, what each change does, and where the many other tables are."""
    from proper_ds.study.results import WHOLE
    from proper_ds.study.rows import ablation_table, score_table
    from proper_ds.study.tables import NAME

    results = json.loads((folder / f"{NAME}.json").read_text(encoding="utf-8"))
    for found in [score_table(results, WHOLE), *(ablation_table(results, method) for method in results["ablations"])]:
        table = Table(title=found.title, title_justify="left")
        for title in found.header:
            table.add_column(title, no_wrap=not table.columns)
        for row in found.rows:
            table.add_row(*row)
        shown.print(table)
    for ending in ("md", "html", "json"):
        shown.print(f"{folder / NAME}.{ending}", highlight=False, soft_wrap=True)


def console() -> Console:
    """A terminal's, or one of a file's width."""
    found = Console()
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = LOG_WIDTH
    return found
