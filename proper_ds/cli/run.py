"""`proper-ds run` and `proper-ds check`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from proper_ds.config import load_config
from proper_ds.observe.log import log_to_file
from proper_ds.observe.progress import ProgressView

LOG_WIDTH = 140
"""Columns of the results table in a file; a terminal has its own."""

Yaml = Annotated[Path, typer.Argument(help="The run's YAML.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="`section.key=value`, as often as you like.")]


def run(
    yaml: Yaml,
    overrides: Overrides = None,
    steps: Annotated[str | None, typer.Option(help="Only these, comma-separated: prepare,base,tokens,...")] = None,
    again: Annotated[bool, typer.Option("--again", help="Read test users for another configuration, too.")] = False,
) -> None:
    """Train and evaluate: every stage that is not done yet, then the report."""
    config = load_config(yaml, overrides or ())
    from proper_ds.evaluation.test_reads import TestReads
    from proper_ds.pipeline.run import Run
    from proper_ds.run_folder import RunFolder

    log_to_file(RunFolder(config.output_path).logs, "driver")
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = LOG_WIDTH
    reads = TestReads([config.output_path], again)
    if Run(config, ProgressView(console), reads=reads).run(steps.split(",") if steps else None):
        show_report(config.output_path, console)


def check(yaml: Yaml, overrides: Overrides = None) -> None:
    """Check configuration, data and base without training, and print the plan."""
    config = load_config(yaml, overrides or ())
    from proper_ds.pipeline.plan import plan_lines

    console = Console()
    for line in plan_lines(config, ProgressView(console)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def show_report(folder: Path, console: Console) -> None:
    """Print the results table and where the report is."""
    import json

    from proper_ds.evaluation.report_rows import results_header, results_rows, title_of

    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for task in report["tasks"]:
        table = Table(title=title_of(report, task), title_justify="left")
        for title in results_header(report, task):
            table.add_column(title, no_wrap=not table.columns)
        for method, cells in results_rows(report, task):
            table.add_row(method, *cells)
        console.print(table)
    for name in ("report.md", "report.html", "report.json"):
        console.print(f"{folder / name}", highlight=False, soft_wrap=True)
