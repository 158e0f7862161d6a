"""A study's tables as rows of text, from what `results.py` makes; `tables.py` lays them out as Markdown and HTML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from proper_ds.evaluation import report_rows
from proper_ds.evaluation.compare import BELOW, WITHIN
from proper_ds.evaluation.report_rows import MARKS, TAUGHT, TAUGHT_LINE, UNKNOWN, gain_text, number, span
from proper_ds.study.results import COSTS, PARTS, WHOLE, ranked

NOT_RUN = "not run"
NOBODY = "nobody"
"""In place of a score where a part of a task's users is empty."""
WHOSE = {
    WHOLE: "all users",
    "lower half": "users in the lower half of history length",
    "upper half": "users in the upper half of history length",
    "cold": "cold users (none or one item)",
}
Results = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        note: what stands below it.
        best: places (row, column) to be marked as best.
        source: the files that its numbers come from, below the runs' folders.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    best: frozenset[tuple[int, int]] = frozenset()
    source: str = "report.json"

    @property
    def caption(self) -> str:
        """What stands below the table: how to read it, and where it comes from."""
        return f"{self.note} From {self.source} of the runs below.".strip()


def tables_of(results: Results) -> list[Table]:
    """Every table that has rows, in the order in which people ask for them."""
    found = [score_table(results, part) for part in PARTS]
    found[1:1] = [verdict_table(results), user_mean_table(results)]
    references = list(results["differences"][WHOLE])
    found += [difference_table(results, part, than) for than in references for part in PARTS]
    found += [ablation_table(results, method) for method in results["ablations"] if _is_changed(results, method)]
    found += [grouping_table(results), cost_table(results), run_table(results)]
    return [table for table in found if table.rows]


def _titles(results: Results, part: str = WHOLE) -> list[str]:
    """Each task with its metric and the number of users of a part."""
    arrows = {True: "↑", False: "↓"}
    return [
        f"{name}: {c['metric']} {arrows[c['higher_is_better']]}, {c['num_users'].get(part, 0)} users"
        for name, c in results["columns"].items()
    ]


def _value(cell: dict[str, Any], key: str = "value") -> str:
    """A score with its interval; over several seeds their mean with the lowest and the highest."""
    seeds = list(cell["by_seed"].values())
    interval = cell["interval" if key == "value" else f"{key}_interval"]
    if len(seeds) > 1 and key == "value":
        few = f"; {span(interval).strip('()')}" if interval is None else ""
        return f"{number(cell[key])} ({number(min(seeds))} to {number(max(seeds))}, {len(seeds)} seeds{few})"
    return f"{number(cell[key])} {span(interval)}"


def _scores(results: Results, part: str, key: str) -> tuple[list[list[str]], frozenset[tuple[int, int]]]:
    """(rows of a part's scores, places of the best)."""
    cells, columns = results["methods"][part], results["columns"]
    order = ranked(cells, columns)
    rows, best = [[f"{method} {TAUGHT}" if method in results["taught_by_asked"] else method] for method in order], set()
    for place, (name, column) in enumerate(columns.items(), start=1):
        there = [cells[method][name][key] for method in order if name in cells[method]]
        top = (max if column["higher_is_better"] else min)(there, default=None)
        for n, method in enumerate(order):
            cell = cells[method].get(name)
            mark = MARKS.get(cell["standing"], "") if cell else ""
            rows[n].append(f"{_value(cell, key)} {mark}".strip() if cell else _missing(column, part))
            if cell and cell[key] == top:
                best.add((n, place))
    return rows, frozenset(best)


def _missing(column: dict[str, Any], part: str) -> str:
    return NOT_RUN if column["num_users"].get(part) else NOBODY


def score_table(results: Results, part: str) -> Table:
    """Methods by tasks, the main metric over questions, for everybody or a part of the users."""
    rows, best = _scores(results, part, "value")
    note = "Methods in the order of their mean rank; the best of each task is marked."
    if results["taught_by_asked"]:
        note += f" {TAUGHT}: {TAUGHT_LINE}"
    if part == WHOLE and any(column["floor"] for column in results["columns"].values()):
        note += (
            f" {MARKS[BELOW]}: not better than the task's best method without a language model;"
            f" {MARKS[WITHIN]}: better, but not beyond the interval of the paired difference. Of several seeds the"
            " worst counts."
        )
    return Table(f"Scores over questions, {WHOSE[part]}", ["method", *_titles(results, part)], rows, note, best)


def verdict_table(results: Results) -> Table:
    """How many tasks each method wins and loses against the references, for all users and by half of history."""
    shown = [(than, part) for than in results["differences"][WHOLE] for part in PARTS if part != "cold"]
    found = results["differences"]
    rows = []
    for method in ranked(results["methods"][WHOLE], results["columns"]):
        cells = [found[part].get(than, {}).get(method, {}) for than, part in shown]
        rows.append([method, *(_verdicts(list(by_column.values())) for by_column in cells)])
    header = ["method", *(f"over {than}, {part}" for than, part in shown)]
    note = (
        "Tasks where it is better beyond the interval / neither / worse beyond the interval; tasks of too few users for"
        " an interval are not counted."
    )
    return Table("Tasks won and lost", header, rows if shown else [], note)


def _verdicts(pairs: list[dict[str, Any]]) -> str:
    verdicts = [pair["verdict"] for pair in pairs if pair["interval"] is not None]
    won, lost = verdicts.count("better"), verdicts.count("worse")
    return f"{won} / {len(verdicts) - won - lost} / {lost}" if verdicts else ""


def user_mean_table(results: Results) -> Table:
    """The same as means of users' own values."""
    rows, best = _scores(results, WHOLE, "user_mean")
    return Table("Scores averaged over users", ["method", *_titles(results)], rows, "", best)


def difference_table(results: Results, part: str, than: str) -> Table:
    """Paired differences of every method to one of them."""
    found = results["differences"][part].get(than, {})
    order = [method for method in ranked(results["methods"][part], results["columns"]) if method in found]
    rows = [
        [
            method,
            *(
                gain_text(found[method][name]) if name in found[method] else _missing(column, part)
                for name, column in results["columns"].items()
            ),
        ]
        for method in order
    ]
    note = "Paired bootstrap over users; positive is better. Not corrected for the number of comparisons."
    return Table(f"Differences to {than}, {WHOSE[part]}", ["method", *_titles(results, part)], rows, note)


def ablation_table(results: Results, method: str) -> Table:
    """One method under each variant."""
    found = results["ablations"][method]
    rows = []
    for variant in results["variants"]:
        cells = [found.get(name, {}).get(variant) for name in results["columns"]]
        if any(cells):
            rows.append([variant, *(_ablated(cell, variant == results["baseline"]) for cell in cells)])
    note = (
        f"Value, and in brackets the difference to {results['baseline']} with its interval: paired by question,"
        " bootstrap over users; positive is better."
    )
    return Table(f"Variants, method {method}", ["variant", *_titles(results)], rows, note, source="predictions/")


def _is_changed(results: Results, method: str) -> bool:
    """Whether any variant changed an answer of a method."""
    cells = [cell for by_variant in results["ablations"][method].values() for cell in by_variant.values()]
    found = [cell["difference"] for cell in cells if cell["difference"]]
    return not found or any(difference["interval"] != [0, 0] for difference in found)


def _ablated(cell: dict[str, Any] | None, is_baseline: bool) -> str:
    if cell is None:
        return NOT_RUN
    if is_baseline:
        return number(cell["value"])
    difference = cell["difference"]
    return f"{number(cell['value'])} ({gain_text(difference) if difference else 'nothing to compare'})"


def grouping_table(results: Results) -> Table:
    """How well experts found the true groups, in runs whose data knows them."""
    header, rows = ["run"], list[list[str]]()
    for name, grouping in results["grouping"].items():
        titles, lines = report_rows.grouping_table({"grouping": grouping})
        header, rows = ["run", *titles], [*rows, *([name, *line] for line in lines)]
    note = "ARI, adjusted Rand index: 1 for the true groups, 0 as by chance. NMI, normalised mutual information."
    return Table("Experts against the true groups", header, rows, note)


def cost_table(results: Results) -> Table:
    """What each method cost over all tasks: sums of seconds and tokens, means of the rest."""
    rows = []
    for method, by_column in results["costs"].items():
        values = {cost: [by_column[name][cost] for name in by_column] for cost in COSTS}
        cells = [_total(values["train_seconds"], ",.0f"), _total(values["train_tokens"], ",.0f")]
        cells += [_total(values["bytes_per_user"], ",.0f", len(by_column))]
        rows.append([method, str(len(by_column)), *cells, _total(values["predict_seconds"], ".4f", len(by_column))])
    header = ["method", "tasks", "training s", "training tokens", "bytes a user", "s an answer"]
    note = (
        "Seconds and tokens of all stages behind a method, summed over its tasks: a second on two ranks counts twice,"
        " and actors' seconds are added up. Bytes and seconds an answer are means over tasks."
        f" {UNKNOWN}: not known."
    )
    return Table("What each method cost", header, rows, note)


def _total(values: list[float | None], form: str, count: int = 1) -> str:
    known = [value for value in values if value is not None]
    return format(sum(known) / count, form) if len(known) == len(values) else UNKNOWN


def run_table(results: Results) -> Table:
    """The runs behind the numbers."""
    rows = [
        [
            run["task"],
            run["variant"],
            str(run["seed"]),
            run["folder"],
            run["config_hash"],
            f"{run['predictions']['file']} {run['predictions']['sha256'][:12]}",
            f"{run['seconds']:,.0f}",
        ]
        for run in results["runs"]
    ]
    header = ["task", "variant", "seed", "folder", "configuration", "answers", "s"]
    note = (
        "`proper-ds run FOLDER/config.yaml` makes a run again, `proper-ds report verify FOLDER` its scores from its"
        " answers. s: seconds of the stages' own work, whoever did it, without starting ranks and actors; the log in"
        " `logs/` has what went by on the clock."
    )
    return Table("Runs", header, rows, note)


def notes_of(results: Results) -> list[str]:
    """What must be said before any table: where it comes from, what is missing, and what it cannot be compared with."""
    lines = [f"Made by `{results['made_by']}` from {len(results['runs'])} runs, listed at the end."]
    if results["missing"]:
        lines.append(f"PARTIAL: {', '.join(results['missing'])}: not finished.")
    if results["baseline"] != "main" or len(results["variants"]) > 1:
        lines.append(f"The tables of scores are of variant {results['baseline']}.")
    same = [method for method in results["ablations"] if not _is_changed(results, method)]
    if same:
        lines.append(f"No variant changed an answer of {', '.join(same)}.")
    about = _by_task(results, lambda run: [_protocol(run["protocol"])])
    lines += [f"Protocol: {line}." for line in about]
    generated = [name for name, column in results["columns"].items() if column["generated"]]
    if generated:
        lines.append(f"GENERATED data, which says nothing about real people: {', '.join(generated)}.")
    if results["test_reads"]:
        reads = ", ".join(f"{name}: {count}" for name, count in results["test_reads"].items())
        lines.append(f"Configurations that had read the test users when a run did, itself among them: {reads}.")
    chosen = sorted({choice["path"] for run in results["runs"] for choice in run["chosen_by"]})
    lines += [f"Settings chosen by {path}." for path in chosen]
    return lines + [f"Not comparable: {line}" for line in _by_task(results, lambda run: run["cautions"])]


def _protocol(about: dict[str, Any]) -> str:
    return f"split {about['split']}, {about['name']}, base {about['base']} ({report_rows.base_text(about)})"


def _by_task(results: Results, lines_of: Callable[[dict[str, Any]], list[str]]) -> list[str]:
    """What is to be told of runs, each line once, with the tasks and variants that it is about unless these are all."""
    whose: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        for line in dict.fromkeys(lines_of(run)):
            whose.setdefault(line, []).append(run)
    return [f"{_whose(line, runs, results['runs'])}{line}" for line, runs in whose.items()]


def _whose(line: str, runs: list[dict[str, Any]], of: list[dict[str, Any]]) -> str:
    """What stands before a line about some of the runs."""
    tasks, variants = ({run[key]: None for run in runs} for key in ("task", "variant"))
    meant = [run for run in of if run["task"] in tasks]
    about = "" if {run["task"] for run in of} == set(tasks) else ", ".join(tasks)
    if {run["variant"] for run in meant} != set(variants):
        about += f"{' ' if about else ''}({', '.join(variants)})"
    return "" if not about or line.startswith(f"{about}: ") else f"{about}: "
