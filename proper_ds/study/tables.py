"""Writes a study's tables: results.json with every number, results.md, results.html and figures for people.

`runner.py` calls `write_results` with the runs that are finished, however few.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from proper_ds.evaluation.plots import gain_by_history
from proper_ds.evaluation.report_html import NUM_PLOTTED, html_table, page
from proper_ds.evaluation.report_rows import main_metric, ranking, references_of
from proper_ds.evaluation.report_text import table as markdown_table
from proper_ds.files import write_json_atomic, write_text_atomic
from proper_ds.study.finished import STATE, FinishedRun
from proper_ds.study.plots import quality_against
from proper_ds.study.results import results_of
from proper_ds.study.rows import Table, notes_of, tables_of

NAME = "results"


@dataclass(frozen=True)
class Plot:
    """One plot: the name of its file, what stands above it, and the SVG."""

    name: str
    title: str
    svg: str

    @property
    def file(self) -> str:
        """Where it lies, as seen from the tables."""
        return f"figures/{self.name}.svg"


def write_results(runs: Sequence[FinishedRun], folder: Path, command: str) -> None:
    """Write the study's tables from the runs that are finished, which may be some of them, or none.

    Args:
        command: what makes the study again, for its readers.
    """
    results = results_of(runs, folder) | {"made_by": command, "missing": _missing(folder)}
    tables, plots = tables_of(results), [*_costs(results), *_gains(runs, results)]
    for stale in [*folder.glob("figures/gain-*.svg"), *folder.glob("figures/quality-*.svg")]:
        stale.unlink()  # of a task that has left the study
    for plot in plots:
        (folder / plot.file).parent.mkdir(exist_ok=True)
        write_text_atomic(folder / plot.file, plot.svg.rstrip() + "\n")
    write_text_atomic(folder / f"{NAME}.html", _html(results, tables, plots))
    write_text_atomic(folder / f"{NAME}.md", _markdown(results, tables, plots))
    write_json_atomic(folder / f"{NAME}.json", results)


def _missing(folder: Path) -> list[str]:
    """Names of the runs that are planned and not finished."""
    path = folder / STATE
    if not path.exists():
        return []
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return ["/".join(Path(run["folder"]).parts[-2:]) for run in state["runs"] if run["state"] != "done"]


def _markdown(results: dict[str, Any], tables: Sequence[Table], plots: Sequence[Plot]) -> str:
    parts = ["# proper_ds study", "", *(f"- {line}" for line in notes_of(results)), ""]
    for table in tables:
        rows = [
            [f"**{cell}**" if (n, place) in table.best else cell for place, cell in enumerate(row)]
            for n, row in enumerate(table.rows)
        ]
        parts += [f"## {table.title}", "", markdown_table(table.header, rows), ""]
        parts += [table.caption, ""]
    for plot in plots:
        parts += [f"## {plot.title}", "", f"![{plot.title}]({plot.file})", ""]
    return "\n".join(parts).rstrip() + "\n"


def _html(results: dict[str, Any], tables: Sequence[Table], plots: Sequence[Plot]) -> str:
    notes = "".join(f"<li>{escape(line)}</li>" for line in notes_of(results))
    parts = ["<h1>proper_ds study</h1>", f"<ul>{notes}</ul>"]
    for table in tables:
        parts += [f"<h2>{escape(table.title)}</h2>", html_table(table.header, table.rows, table.best)]
        parts.append(f"<p class='small'>{escape(table.caption)}</p>")
    for plot in plots:
        parts += [f"<h2>{escape(plot.title)}</h2>", f"<figure>{plot.svg}</figure>"]
    return page("proper_ds study", parts)


def _costs(results: dict[str, Any]) -> Iterator[Plot]:
    """Quality against what it costs."""
    for cost, label in (("bytes_per_user", "bytes a user"), ("train_seconds", "training seconds")):
        svg = quality_against(results, cost, label)
        if svg:
            yield Plot(f"quality-{cost.replace('_', '-')}", f"Quality against {label}", svg)


def _gains(runs: Sequence[FinishedRun], results: dict[str, Any]) -> Iterator[Plot]:
    """The best methods' gains by history length, for each task of the first seed's run."""
    num_named = Counter[str]()
    for name, column in results["columns"].items():
        wanted = (column["task"], results["baseline"])
        run = next((r for r in runs if (r.task, r.variant) == wanted and column["inner"] in r.report["tasks"]), None)
        inner = column["inner"]
        rival = next(iter(references_of(run.report, inner)), None) if run else None
        if run is None or rival is None:
            continue
        others = [method for method in ranking(run.report, inner) if method != rival][:NUM_PLOTTED]
        svg = gain_by_history(run.report["tasks"][inner], main_metric(run.report, inner), rival, others)
        if svg:
            title = f"{name}: gain over {rival} by history length, the best methods"
            file = re.sub(r"[^A-Za-z0-9._+-]+", "-", name)
            num_named[file] += 1
            yield Plot(f"gain-{file}" if num_named[file] == 1 else f"gain-{file}-{num_named[file]}", title, svg)
