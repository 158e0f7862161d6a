"""The report as one self-contained HTML file: tables and plots, no scripts, nothing fetched."""

from __future__ import annotations

from html import escape
from typing import Any

from proper_ds.evaluation.gate_plots import gate_curves
from proper_ds.evaluation.gates import GATE_HEADER, gate_rows, jump_lines, problem_lines
from proper_ds.evaluation.plots import expert_spread, gain_by_history, learning_curves
from proper_ds.evaluation.report_text import (
    against,
    main_metric,
    number,
    results_header,
    results_rows,
    title_of,
    update_lines,
)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #202124; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 0.8rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.25rem 0.8rem; border-bottom: 1px solid #eee; } th { background: #f6f7f8; }
.note { background: #fff4ce; padding: 0.5rem 0.8rem; border-left: 4px solid #e69f00; }
.small { color: #5f6368; font-size: 0.9rem; } .better { color: #137333; } .worse { color: #b3261e; }
svg { max-width: 100%; height: auto; } code { background: #f3f4f6; padding: 0 0.25rem; }
"""


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    kind = f' class="{text}"' if text in ("better", "worse") else ""
    return f"<td{kind}>{escape(text)}</td>"


def _figure(svg: str | None, caption: str) -> str:
    return f"<figure>{svg}<figcaption class='small'>{escape(caption)}</figcaption></figure>" if svg else ""


def _task_part(report: dict[str, Any], task: str) -> str:
    about, methods = report["tasks"][task], list(report["methods"])
    rows = [[method, *cells] for method, cells in results_rows(report, task)]
    parts = [f"<h2>{escape(title_of(report, task))}</h2>", _table(results_header(report, task), rows)]
    metric = main_metric(report, task)
    rival = "population" if "population" in methods else methods[0]
    parts.append(
        _figure(
            gain_by_history(about, metric, rival, methods),
            f"Gain over {rival} by history length, with paired bootstrap intervals; above zero is better.",
        )
    )
    compared = [
        [f"{row[0]} vs {r}", *row[1:]] for r in ("base", "population", "OPPU") for row in against(report, task, r)
    ]
    if compared:
        parts.append("<h3>Paired differences over users</h3>")
        parts.append(_table(["difference", "metric", "gain (positive is better)", "interval", "verdict"], compared))
    rows = [
        [
            bucket["history"],
            str(bucket["num_users"]),
            str(bucket["num_questions"]),
            *(number(bucket["methods"][method][metric]["value"]) for method in methods),
        ]
        for bucket in about["by_history"]
    ]
    parts.append(f"<h3>By history length, {escape(metric)}</h3>")
    parts.append(_table(["history items", "users", "questions", *methods], rows))
    return "\n".join(parts)


def _about(report: dict[str, Any]) -> str:
    protocol = report["protocol"]
    notes = "".join(f"<li><b>{escape(n)}</b>: {escape(says)}</li>" for n, says in report["method_notes"].items())
    return (
        f"<p>Run <code>{escape(report['run'])}</code>, base <code>{escape(report['base'])}</code>, configuration"
        f" <code>{escape(report['config_digest'])}</code>. Questions of split <code>{escape(protocol['split'])}</code>;"
        f" closed label sets: {escape(protocol['closed_labels'])}, ratings by their {escape(protocol['ordinal'])}."
        f" Values are over questions; intervals are {protocol['confidence']:.0%} bootstrap intervals over users"
        f" ({protocol['num_bootstrap_samples']} samples).</p><ul>{notes}</ul>"
    )


def _costs(report: dict[str, Any]) -> str:
    users = report["users"]
    parts = ["<h2>Adapters and time</h2>"]
    parts.append(f"<p>{users['num_users']} users, {users['num_cold_users']} of them without history.</p>")
    rows = [
        [name, str(s["num_adapters"]), str(s["num_failed"]), f"{s['bytes_per_user']:,.0f}", f"{s['num_bytes']:,}"]
        for name, s in users["sets"].items()
    ]
    if rows:
        parts.append(_table(["set", "adapters", "failed", "bytes a user", "bytes"], rows))
    parts += [f"<p>{escape(line)}</p>" for line in update_lines(report)]
    parts.append(_table(["stage", "seconds"], [[name, f"{s:.1f}"] for name, s in report["stages"].items()]))
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts.append(f"<p class='small'>{escape(versions)}</p>")
    return "\n".join(parts)


def _gates(report: dict[str, Any]) -> list[str]:
    """What the routers did while they trained; nothing where no stage mixes experts."""
    if not report["gates"]:
        return []
    parts = ["<h3>Gates and experts in training</h3>"]
    parts += [f"<p class='note'>{escape(line)}</p>" for line in problem_lines(report)]
    caption = (
        "As stages train: how sharp the gates are and how evenly experts are used; users by their strongest expert;"
        " cosines between the experts' updates at the end."
    )
    parts.append(_figure(gate_curves(report["gates"]), caption))
    parts.append(_table(GATE_HEADER, gate_rows(report["gates"])))
    return parts + [f"<p>{escape(line)}</p>" for line in jump_lines(report)]


def html_of(report: dict[str, Any], events: list[dict[str, Any]]) -> str:
    """The whole report; `events` are the lines of metrics.jsonl, for the learning curves."""
    parts = ["<h1>proper_ds report</h1>"]
    if any(task["generated"] for task in report["tasks"].values()):
        parts.append("<p class='note'>The data is generated: these figures say nothing about real people.</p>")
    parts.append(_about(report))
    parts += [_task_part(report, task) for task in report["tasks"]]
    parts.append("<h2>Experts</h2>" if report["experts"] or report["gates"] else "")
    parts.append(
        _figure(
            expert_spread(report["experts"]),
            "How users spread over experts: for each adapted module, the share of users whose strongest expert it is.",
        )
    )
    parts += _gates(report)
    parts.append("<h2>Learning curves</h2>")
    parts.append(_figure(learning_curves(events), "Loss per target token of each stage that runs in steps."))
    parts.append(_costs(report))
    body = "\n".join(part for part in parts if part)
    head = f"<meta charset='utf-8'><title>proper_ds report</title><style>{STYLE}</style>"
    return f"<!doctype html>\n<html lang='en'><head>{head}</head><body>\n{body}\n</body></html>\n"
