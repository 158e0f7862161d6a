"""The report as Markdown, and its main table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from proper_ds.evaluation.gates import GATE_HEADER, gate_rows, jump_lines, problem_lines


def number(value: float) -> str:
    """A score as it is printed everywhere."""
    return f"{value:.3f}"


def span(interval: list[float]) -> str:
    """An interval as it is printed everywhere."""
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def results_rows(report: dict[str, Any], task: str) -> Iterator[tuple[str, list[str]]]:
    """(method, for each metric `value [interval]` and user mean) of one task."""
    for method, tasks in report["methods"].items():
        cells = []
        for metric in report["tasks"][task]["metrics"]:
            entry = tasks[task][metric]
            cells += [f"{number(entry['value'])} {span(entry['interval'])}", number(entry["user_mean"])]
        yield method, cells


def results_header(report: dict[str, Any], task: str) -> list[str]:
    """Column titles that go with `results_rows`; the arrow says which way is better."""
    titles = ["method"]
    for metric, higher in report["tasks"][task]["metrics"].items():
        titles += [f"{metric} {'↑' if higher else '↓'}", "user mean"]
    return titles


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def title_of(report: dict[str, Any], task: str) -> str:
    """The task's heading; generated data is called so."""
    about = report["tasks"][task]
    kind = "GENERATED data, " if about["generated"] else ""
    return f"{task} ({kind}{about['lamp_id']}: {about['num_questions']} questions of {about['num_users']} users)"


def against(report: dict[str, Any], task: str, rival: str) -> list[list[str]]:
    """Rows [method, metric, gain, interval, verdict] of every later method against `rival`."""
    rows = []
    for metric, pairs in report["tasks"][task]["comparisons"].items():
        rows += [
            [pair["method"], metric, f"{pair['gain']:+.3f}", span(pair["interval"]), pair["verdict"]]
            for pair in pairs
            if pair["than"] == rival
        ]
    return rows


def main_metric(report: dict[str, Any], task: str) -> str:
    """The first metric of a task: the one that plots and short tables show."""
    return next(iter(report["tasks"][task]["metrics"]))


def _by_history(report: dict[str, Any], task: str) -> str:
    metric = main_metric(report, task)
    header = ["history items", "users", "questions", *report["methods"]]
    rows = [
        [
            bucket["history"],
            str(bucket["num_users"]),
            str(bucket["num_questions"]),
            *(number(bucket["methods"][method][metric]["value"]) for method in report["methods"]),
        ]
        for bucket in report["tasks"][task]["by_history"]
    ]
    return f"By history length, {metric}:\n\n" + table(header, rows)


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


def _costs(report: dict[str, Any]) -> str:
    parts = ["## Adapters and time", ""]
    users = report["users"]
    parts.append(f"{users['num_users']} users, {users['num_cold_users']} of them without history.")
    rows = [
        [name, str(s["num_adapters"]), str(s["num_failed"]), f"{s['bytes_per_user']:,.0f}", f"{s['num_bytes']:,}"]
        for name, s in users["sets"].items()
    ]
    if rows:
        parts += ["", table(["set", "adapters", "failed", "bytes a user", "bytes"], rows)]
    parts += [line for text in update_lines(report) for line in ("", text)]
    parts += ["", table(["stage", "seconds"], [[name, f"{s:.1f}"] for name, s in report["stages"].items()])]
    return "\n".join(parts)


def _gates(report: dict[str, Any]) -> list[str]:
    if not report["gates"]:
        return []
    parts = ["## Experts", "", table(GATE_HEADER, gate_rows(report["gates"])), ""]
    parts += [line for text in jump_lines(report) for line in (text, "")]
    return parts + [line for text in problem_lines(report) for line in (f"**Warning**, {text}", "")]


def markdown_of(report: dict[str, Any]) -> str:
    """The whole report as Markdown."""
    protocol = report["protocol"]
    parts = ["# proper_ds report", ""]
    if any(task["generated"] for task in report["tasks"].values()):
        parts += ["**The data is generated, not collected: these figures say nothing about real people.**", ""]
    parts += [
        f"Run `{report['run']}`, base `{report['base']}`, configuration `{report['config_digest']}`.",
        f"Questions of split `{protocol['split']}`; closed label sets: {protocol['closed_labels']}, ratings by their"
        f" {protocol['ordinal']}. Values are over questions; intervals are {protocol['confidence']:.0%} bootstrap"
        f" intervals over users ({protocol['num_bootstrap_samples']} samples).",
        "",
        *(f"- **{name}**: {note}" for name, note in report["method_notes"].items()),
        "",
    ]
    rivals = [name for name in ("base", "population", "OPPU") if name in report["methods"]]
    for task in report["tasks"]:
        rows = [[method, *cells] for method, cells in results_rows(report, task)]
        parts += [f"## {title_of(report, task)}", "", table(results_header(report, task), rows), ""]
        compared = [[f"{row[0]} vs {rival}", *row[1:]] for rival in rivals for row in against(report, task, rival)]
        if compared:
            header = ["difference", "metric", "gain (positive is better)", "interval", "verdict"]
            parts += ["Paired differences over users:", "", table(header, compared), ""]
        parts += [_by_history(report, task), ""]
    parts += _gates(report)
    parts.append(_costs(report))
    return "\n".join(parts) + "\n"
