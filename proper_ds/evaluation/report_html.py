"""The report as one self-contained HTML file: tables and plots, no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Collection
from html import escape
from typing import Any

from proper_ds.evaluation import report_rows as rows_of
from proper_ds.evaluation.gate_plots import gate_curves
from proper_ds.evaluation.gates import GATE_HEADER, gate_rows, jump_lines, problem_lines
from proper_ds.evaluation.plots import expert_spread, gain_by_history, learning_curves
from proper_ds.evaluation.report_text import set_table, update_lines, users_line

NUM_PLOTTED = 8
"""Methods in a plot: the best ones, so that bars stay wide enough to be read."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #202124; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 0.8rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.25rem 0.8rem; border-bottom: 1px solid #eee; } th { background: #f6f7f8; }
.wide { overflow-x: auto; } .wide td { white-space: nowrap; } td.best { font-weight: 600; }
.note { background: #fff4ce; padding: 0.5rem 0.8rem; border-left: 4px solid #e69f00; }
.small { color: #5f6368; font-size: 0.9rem; } .better { color: #137333; } .worse { color: #b3261e; }
svg { max-width: 100%; height: auto; } code { background: #f3f4f6; padding: 0 0.25rem; }
"""


def html_table(header: list[str], rows: list[list[str]], best: Collection[tuple[int, int]] = ()) -> str:
    """A table that scrolls within itself; cells at the places `best` (row, column) are marked."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = [[_cell(cell, (n, place) in best) for place, cell in enumerate(row)] for n, row in enumerate(rows)]
    body = "".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(text: str, is_best: bool) -> str:
    kinds = ["best"] if is_best else []
    kinds += [word for word in ("better", "worse") if text.endswith((word, f"{word})"))]
    return f"<td class='{' '.join(kinds)}'>{escape(text)}</td>" if kinds else f"<td>{escape(text)}</td>"


def _titled(title: str, made: tuple[list[str], list[list[str]]]) -> str:
    header, rows = made
    return f"<h3>{escape(title)}</h3>\n{html_table(header, rows)}" if rows else ""


def _text(line: str, kind: str = "") -> str:
    return f"<p{f' class={kind!r}' if kind else ''}>{escape(line)}</p>" if line else ""


def _figure(svg: str | None, caption: str) -> str:
    return f"<figure>{svg}<figcaption class='small'>{escape(caption)}</figcaption></figure>" if svg else ""


def _task_part(report: dict[str, Any], task: str) -> str:
    metric, ranking = rows_of.main_metric(report, task), rows_of.ranking(report, task)
    rows = [[method, *cells] for method, cells in rows_of.results_rows(report, task)]
    parts = [f"<h2>{escape(rows_of.title_of(report, task))}</h2>"]
    parts.append(html_table(rows_of.results_header(report, task), rows, [(0, 0), (0, 1)]))
    parts.append(_text(rows_of.sign_line(report, task), "small"))
    for rival in rows_of.references_of(report, task)[:1]:
        others = [method for method in ranking if method != rival][:NUM_PLOTTED]
        caption = f"Gain over {rival} by history length, with paired bootstrap intervals; above zero is better."
        if len(ranking) > NUM_PLOTTED + 1:
            caption += f" The {NUM_PLOTTED} best methods."
        parts.append(_figure(gain_by_history(report["tasks"][task], metric, rival, others), caption))
    parts.append(_titled(f"Paired differences over users, {metric}", rows_of.difference_table(report, task)))
    parts.append(_titled("The same over users' own values", rows_of.user_mean_table(report, task)))
    parts.append(_titled(f"By history length, {metric}", rows_of.history_table(report, task)))
    parts.append(_titled("Paired differences by half of history length", rows_of.halves_table(report, task)))
    parts.append(_titled("For orientation, not comparable", rows_of.published_table(report, task)))
    return "\n".join(part for part in parts if part)


def _about(report: dict[str, Any]) -> str:
    notes = "".join(f"<li><b>{escape(n)}</b>: {escape(says)}</li>" for n, says in report["method_notes"].items())
    lines = "".join(f"<li>{escape(line)}</li>" for line in rows_of.protocol_lines(report))
    return f"<h2>Methods</h2><ul>{notes}</ul>\n<h2>Protocol</h2><ul>{lines}</ul>"


def _costs(report: dict[str, Any]) -> str:
    parts = ["<h2>What each method cost</h2>", html_table(*rows_of.cost_table(report))]
    parts += [_text(rows_of.COST_LINE, "small"), _text(users_line(report)), _titled("Adapters", set_table(report))]
    parts += [_text(line) for line in update_lines(report)]
    seconds = [[name, f"{seconds:.1f}"] for name, seconds in report["stages"].items()]
    parts.append(_titled("Stages", (["stage", "seconds"], seconds)))
    parts.append(_text(", ".join(f"{name} {version}" for name, version in report["versions"].items()), "small"))
    return "\n".join(part for part in parts if part)


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
    parts.append(html_table(GATE_HEADER, gate_rows(report["gates"])))
    return parts + [f"<p>{escape(line)}</p>" for line in jump_lines(report)]


def page(title: str, parts: list[str]) -> str:
    """A whole HTML page of the parts that are not empty."""
    body = "\n".join(part for part in parts if part)
    head = f"<meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html>\n<html lang='en'><head>{head}</head><body>\n{body}\n</body></html>\n"


def html_of(report: dict[str, Any], events: list[dict[str, Any]]) -> str:
    """The whole report; `events` are the lines of metrics.jsonl, for the learning curves."""
    parts = ["<h1>proper_ds report</h1>", f"<p>Run <code>{escape(report['run'])}</code>.</p>"]
    if any(task["generated"] for task in report["tasks"].values()):
        parts.append("<p class='note'>The data is generated: these figures say nothing about real people.</p>")
    parts += [_task_part(report, task) for task in report["tasks"]]
    parts.append(_about(report))
    parts.append("<h2>Experts</h2>" if report["experts"] or report["gates"] else "")
    caption = "How users spread over experts: for each adapted module, the share of users whose strongest expert it is."
    parts.append(_figure(expert_spread(report["experts"]), caption))
    parts.append(_titled("Label priors", rows_of.prior_table(report)))
    parts.append(_titled("Against the true groups", rows_of.grouping_table(report)))
    parts += _gates(report)
    parts.append("<h2>Learning curves</h2>")
    parts.append(_figure(learning_curves(events), "Loss per target token of each stage that runs in steps."))
    return page("proper_ds report", [*parts, _costs(report)])
