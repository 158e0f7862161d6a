"""The report as Markdown."""

from __future__ import annotations

from typing import Any

from proper_ds.evaluation import report_rows as rows_of
from proper_ds.evaluation.gates import GATE_HEADER, gate_rows, jump_lines, problem_lines


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _titled(title: str, made: tuple[list[str], list[list[str]]]) -> list[str]:
    """A table under its title; nothing where it has no rows."""
    header, rows = made
    return [title, "", table(header, rows), ""] if rows else []


def _task_part(report: dict[str, Any], task: str) -> list[str]:
    metric = rows_of.main_metric(report, task)
    results = [[method, *cells] for method, cells in rows_of.results_rows(report, task)]
    results[0] = [f"**{cell}**" if n < 2 else cell for n, cell in enumerate(results[0])]
    parts = _titled(f"## {rows_of.title_of(report, task)}", (rows_of.results_header(report, task), results))
    if line := rows_of.sign_line(report, task):
        parts += [line, ""]
    parts += _titled(f"Paired differences over users, {metric}:", rows_of.difference_table(report, task))
    parts += _titled("The same over users' own values:", rows_of.user_mean_table(report, task))
    parts += _titled(f"By history length, {metric}:", rows_of.history_table(report, task))
    parts += _titled("Paired differences by half of history length:", rows_of.halves_table(report, task))
    return parts + _titled("For orientation, not comparable:", rows_of.published_table(report, task))


def update_lines(report: dict[str, Any]) -> list[str]:
    """What an update (user.only_changed) kept and trained; nothing for other runs."""
    if not report["kept"]:
        return []
    kept = ", ".join(f"{name} (of {since})" for name, since in report["kept"].items())
    lines = [f"Kept as they were made from earlier data: {kept}."]
    for name, about in report["users"]["sets"].items():
        versions = ", ".join(f"{count} of version {version}" for version, count in about["num_by_version"].items())
        lines.append(f"Adapters of {name}: {versions}.")
    return lines


def set_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): the sets of users' adapters."""
    rows = [
        [name, str(s["num_adapters"]), str(s["num_failed"]), f"{s['bytes_per_user']:,.0f}", f"{s['num_bytes']:,}"]
        for name, s in report["users"]["sets"].items()
    ]
    return ["set", "adapters", "failed", "bytes a user", "bytes"], rows


def users_line(report: dict[str, Any]) -> str:
    """How many users there are."""
    users = report["users"]
    return f"{users['num_users']} users, {users['num_cold_users']} of them without history."


def _costs(report: dict[str, Any]) -> list[str]:
    parts = _titled("## What each method cost", rows_of.cost_table(report))
    parts += [rows_of.COST_LINE, "", users_line(report), ""]
    parts += _titled("Label priors:", rows_of.prior_table(report))
    parts += _titled("Adapters:", set_table(report))
    parts += [line for text in update_lines(report) for line in (text, "")]
    seconds = [[name, f"{seconds:.1f}"] for name, seconds in report["stages"].items()]
    return parts + _titled("Stages:", (["stage", "seconds"], seconds))


def _gates(report: dict[str, Any]) -> list[str]:
    parts = _titled("## Experts", (GATE_HEADER, gate_rows(report["gates"])))
    parts += _titled("Against the true groups:", rows_of.grouping_table(report))
    parts += [line for text in jump_lines(report) for line in (text, "")]
    return parts + [line for text in problem_lines(report) for line in (f"**Warning**, {text}", "")]


def markdown_of(report: dict[str, Any]) -> str:
    """The whole report as Markdown."""
    parts = ["# proper_ds report", "", f"Run `{report['run']}`.", ""]
    if any(task["generated"] for task in report["tasks"].values()):
        parts += ["**The data is generated, not collected: these figures say nothing about real people.**", ""]
    for task in report["tasks"]:
        parts += _task_part(report, task)
    parts += ["## Methods", "", *(f"- **{name}**: {note}" for name, note in report["method_notes"].items()), ""]
    parts += ["## Protocol", "", *(f"- {line}" for line in rows_of.protocol_lines(report)), ""]
    parts += _gates(report)
    return "\n".join([*parts, *_costs(report)]).rstrip() + "\n"
