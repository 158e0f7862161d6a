"""What the runs of a study found, in one dictionary: scores by method and task, differences, ablations, costs.

Pure functions of finished runs; `tables.py` writes what they make.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from proper_ds.evaluation.compare import STANDINGS, verdict
from proper_ds.study.finished import FinishedRun
from proper_ds.study.paired import paired_difference

MAIN = "main"
WHOLE = "all"
PARTS = (WHOLE, "lower half", "upper half", "cold")
"""Whose questions a table is of: everybody's, by half of history length, and of users with none or one item."""


def results_of(runs: Sequence[FinishedRun], folder: Path) -> dict[str, Any]:
    """Everything that results.json holds.

    Keys: `baseline`, the variant that the main tables are of; `columns`, the tasks, with `num_users` [part] of the
    first run; `methods` [part][method][column],
    a cell; `differences` [part][reference][method][column]; `ablations` [method][column][variant]; `costs`
    [method][column]; `runs`, with the files that all numbers come from; `grouping` and `test_reads` by run.
    """
    variants = list(dict.fromkeys(run.variant for run in runs))
    baseline = MAIN if MAIN in variants or not variants else variants[0]
    columns = _columns(runs)
    main = {name: _runs_of(runs, column, baseline) for name, column in columns.items()}
    return {
        "baseline": baseline,
        "variants": variants,
        "columns": columns,
        "methods": {part: _methods(main, columns, part) for part in PARTS},
        "differences": {part: _differences(main, columns, part) for part in PARTS},
        "ablations": _ablations(runs, columns, baseline) if len(variants) > 1 else {},
        # reports of earlier versions do not say it
        "taught_by_asked": sorted(
            {m for own in main.values() for r in own for m in r.report.get("taught_by_asked", [])}
        ),
        "costs": _costs(main),
        "runs": [_about(run, folder) for run in runs],
        "grouping": {run.name: run.report["grouping"] for run in runs if run.report["grouping"]},
        "test_reads": {run.name: run.report["test_reads"] for run in runs if run.report["test_reads"]},
    }


def _columns(runs: Sequence[FinishedRun]) -> dict[str, dict[str, Any]]:
    """The tasks: a study's task has a column for each task that its data holds."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        for inner, about in run.report["tasks"].items():
            name = run.task if len(run.report["tasks"]) == 1 else f"{run.task}: {inner}"
            metric = next(iter(about["metrics"]))
            found.setdefault(
                name,
                {
                    "task": run.task,
                    "inner": inner,
                    "metric": metric,
                    "higher_is_better": about["metrics"][metric],
                    "generated": about["generated"],
                    "floor": (about["floor"] or {}).get("than"),
                    "num_users": {WHOLE: about["num_users"]}
                    | {one["part"]: one["num_users"] for one in about["parts"]},
                },
            )
    return found


def _runs_of(runs: Iterable[FinishedRun], column: dict[str, Any], variant: str) -> list[FinishedRun]:
    """The runs of a variant that have a column, by seed."""
    found = [run for run in runs if (run.task, run.variant) == (column["task"], variant)]
    return sorted((run for run in found if column["inner"] in run.report["tasks"]), key=lambda run: run.seed)


def _part_of(run: FinishedRun, inner: str, part: str) -> dict[str, Any] | None:
    """`methods` and `comparisons` of a part of a run's users, or None where there is nobody in it."""
    about: dict[str, Any] = run.report["tasks"][inner]
    if part == WHOLE:
        methods = {name: tasks[inner] for name, tasks in run.report["methods"].items() if inner in tasks}
        return {"methods": methods, "comparisons": about["comparisons"]}
    return next((one for one in about["parts"] if one["part"] == part), None)


def _methods(
    main: dict[str, list[FinishedRun]], columns: dict[str, dict[str, Any]], part: str
) -> dict[str, dict[str, Any]]:
    """[method][column] cells of a part; what was not run is left out."""
    found: dict[str, dict[str, Any]] = {}
    for name, runs in main.items():
        inner, metric = columns[name]["inner"], columns[name]["metric"]
        entries: dict[str, dict[int, dict[str, Any]]] = {}
        for run in runs:
            for method, metrics in (_part_of(run, inner, part) or {"methods": {}})["methods"].items():
                entries.setdefault(method, {})[run.seed] = metrics[metric]
        for method, by_seed in entries.items():
            cell = _cell(by_seed) | {"standing": _standing(runs, inner, method) if part == WHOLE else None}
            found.setdefault(method, {})[name] = cell
    return found


def _standing(runs: Sequence[FinishedRun], inner: str, method: str) -> str | None:
    """How a method stands to the best method without a language model; over several seeds, in the worst of them."""
    floors = [run.report["tasks"][inner]["floor"] for run in runs]
    found = {floor["methods"][method]["standing"] for floor in floors if floor and method in floor["methods"]}
    return next((standing for standing in STANDINGS if standing in found), None)


def _cell(by_seed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One method's score over seeds: means, and from the lowest to the highest end of the seeds' intervals."""
    entries = list(by_seed.values())
    return {
        "value": _mean(entry["value"] for entry in entries),
        "interval": _hull([entry["interval"] for entry in entries]),
        "user_mean": _mean(entry["user_mean"] for entry in entries),
        "user_mean_interval": _hull([entry["user_mean_interval"] for entry in entries]),
        "by_seed": {str(seed): entry["value"] for seed, entry in by_seed.items()},
    }


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _hull(intervals: Sequence[Sequence[float] | None]) -> list[float] | None:
    """From the lowest to the highest end; None where a seed has no interval, of too few users."""
    known = [interval for interval in intervals if interval is not None]
    if len(known) < len(intervals):
        return None
    return [min(low for low, _ in known), max(high for _, high in known)]


def _differences(
    main: dict[str, list[FinishedRun]], columns: dict[str, dict[str, Any]], part: str
) -> dict[str, dict[str, dict[str, Any]]]:
    """[reference][method][column] paired differences; over several seeds the mean, and the hull of the intervals."""
    pairs: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for name, runs in main.items():
        inner, metric = columns[name]["inner"], columns[name]["metric"]
        for run in runs:
            for pair in (_part_of(run, inner, part) or {"comparisons": {metric: []}})["comparisons"][metric]:
                pairs.setdefault((pair["than"], pair["method"], name), []).append(pair)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (than, method, name), seeds in pairs.items():
        interval = _hull([pair["interval"] for pair in seeds])
        found.setdefault(than, {}).setdefault(method, {})[name] = {
            "gain": _mean(pair["gain"] for pair in seeds),
            "interval": interval,
            "verdict": verdict(interval),
        }
    return found


def _ablations(
    runs: Sequence[FinishedRun], columns: dict[str, dict[str, Any]], baseline: str
) -> dict[str, dict[str, dict[str, Any]]]:
    """[method][column][variant]: the value, and the difference to the baseline, paired by question where both ran."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, column in columns.items():
        before = _runs_of(runs, column, baseline)
        for variant in dict.fromkeys(run.variant for run in runs):
            own = _runs_of(runs, column, variant)
            for method in _answering(own, column):
                cells = {r.seed: r.report["methods"][method][column["inner"]][column["metric"]] for r in own}
                cell = _cell(cells) | {"difference": None}
                if variant != baseline and method in _answering(before, column):
                    cell["difference"] = paired_difference(before, own, column["inner"], method)
                found.setdefault(method, {}).setdefault(name, {})[variant] = cell
    return {method: tasks for method, tasks in found.items() if any(len(cells) > 1 for cells in tasks.values())}


def _answering(runs: Sequence[FinishedRun], column: dict[str, Any]) -> list[str]:
    """The methods of some runs that answer the column's task: label priors leave others out."""
    methods = runs[0].report["methods"] if runs else {}
    return [method for method, tasks in methods.items() if column["inner"] in tasks]


PROTOCOL = ("name", "split", "base", "base_parameters", "base_made_in_steps")
COSTS = ("train_seconds", "train_tokens", "bytes_per_user", "predict_seconds")


def _costs(main: dict[str, list[FinishedRun]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """[method][column] costs, the mean over seeds; a run of several tasks has one cost, under each of them."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, runs in main.items():
        for method in runs[0].report["costs"] if runs else ():
            each = [run.report["costs"].get(method, {}) for run in runs]
            found.setdefault(method, {})[name] = {
                cost: None if any(one.get(cost) is None for one in each) else _mean(one[cost] for one in each)
                for cost in COSTS
            }
    return found


def _about(run: FinishedRun, folder: Path) -> dict[str, Any]:
    """Where a run's numbers come from."""
    return {
        "task": run.task,
        "variant": run.variant,
        "seed": run.seed,
        "folder": os.path.relpath(run.folder, folder),
        "config_hash": run.config_hash,
        "predictions": run.report["predictions"],
        "protocol": {key: run.report["protocol"].get(key) for key in PROTOCOL},
        "cautions": run.report["protocol"]["cautions"],
        "chosen_by": run.report["chosen_by"],
        "seconds": run.seconds,
    }


def ranked(cells: dict[str, dict[str, Any]], columns: dict[str, dict[str, Any]]) -> list[str]:
    """Methods by their mean rank over the columns they were run in, the best first."""

    def rank(method: str, name: str) -> int:
        sign = 1 if columns[name]["higher_is_better"] else -1
        own = sign * cells[method][name]["value"]
        return sum(sign * other[name]["value"] > own for other in cells.values() if name in other)

    return sorted(cells, key=lambda method: _mean(rank(method, name) for name in cells[method]))
