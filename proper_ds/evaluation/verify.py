"""Where a report's numbers come from, and whether they still follow from it: `proper-ds report verify`.

`report.py` writes the checksums of the predictions; everything else is read from report.json and those files alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from proper_ds.data.manifest import TaskManifest
from proper_ds.errors import UserError
from proper_ds.evaluation.configuration import configuration_digest
from proper_ds.evaluation.questions import SCORED, prediction_files, read_predictions
from proper_ds.evaluation.results import Scoring, score_tasks
from proper_ds.files import write_text_atomic

SUMS = "predictions.sha256"
"""The checksums of all files of predictions, as `sha256sum` writes and checks them."""
TOLERANCE = 1e-9
"""Sums over users are rounded differently on another machine."""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sums_of(root: Path, methods: Sequence[str]) -> str:
    files = prediction_files(root, methods)
    return "".join(f"{_sha256(path)}  {path.relative_to(root).as_posix()}\n" for path in files)


def write_sums(root: Path, methods: Sequence[str]) -> dict[str, str]:
    """Write the checksums of the predictions of the run in `root`; what a report says of them."""
    write_text_atomic(root / SUMS, _sums_of(root, methods))
    return {"file": SUMS, "sha256": _sha256(root / SUMS)}


@dataclass(frozen=True)
class Verified:
    """What a verification found.

    Attributes:
        num_numbers: numbers of the report that were computed again.
        problems: what does not agree, one line each; empty where all does.
    """

    num_numbers: int
    num_files: int
    problems: list[str]


def verify(root: Path) -> Verified:
    """Compute all scores of the report in `root` again from the files of predictions that it names.

    The configuration in `config.yaml` must be the one that the report was made with.

    Raises:
        UserError: where there is no report, or no predictions.
    """
    try:
        report = json.loads((root / "report.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{root} holds no report.json; give the folder of a run that has its report") from None
    if "predictions" not in report:
        raise UserError(f"{root}/report.json names no predictions: it is of an earlier version; make it again")
    protocol, methods = report["protocol"], list(report["methods"])
    files = prediction_files(root, methods)
    if not files:
        raise UserError(f"{root} holds no predictions to compute the numbers of its report from")
    scoring = Scoring(protocol["num_bootstrap_samples"], protocol["confidence"], tuple(protocol["references"]))
    manifests = {name: manifest_of(name, about) for name, about in report["tasks"].items()}
    again = by_method(score_tasks(read_predictions(root, methods, SCORED), manifests, methods, scoring), methods)
    there = {
        name: {key: value for key, value in report["tasks"][name].items() if key in task}
        for name, task in again["tasks"].items()
    }
    problems = _other_configuration(root, report) + _changed_files(root, methods, report["predictions"])
    problems += differences(again, {"methods": report["methods"], "tasks": there})
    return Verified(sum(1 for _ in _numbers(again)), len(files), problems)


def by_method(tasks: dict[str, dict[str, Any]], methods: Sequence[str]) -> dict[str, Any]:
    """`score_tasks` as report.json has it: `methods` [method][task][metric], and `tasks` with all the rest."""
    return {
        "methods": {
            m: {name: task["methods"][m] for name, task in tasks.items() if m in task["methods"]} for m in methods
        },
        "tasks": {name: {key: part for key, part in task.items() if key != "methods"} for name, task in tasks.items()},
    }


def differences(wanted: Any, given: Any, where: str = "") -> list[str]:
    """Where two JSON values differ by more than rounding, one line each."""
    if isinstance(wanted, dict) and isinstance(given, dict):
        found = [f"{where}.{key}: only one has it" for key in wanted.keys() ^ given.keys()]
        parts = [(f"{where}.{key}".lstrip("."), value, given[key]) for key, value in wanted.items() if key in given]
    elif isinstance(wanted, list) and isinstance(given, list) and len(wanted) == len(given):
        found, parts = [], [(f"{where}[{n}]", *pair) for n, pair in enumerate(zip(wanted, given, strict=True))]
    elif _equal(wanted, given):
        return []
    else:
        return [f"{where}: {given!r} in the report, {wanted!r} from the predictions"]
    return found + [line for part in parts for line in differences(part[1], part[2], part[0])]


def _equal(wanted: Any, given: Any) -> bool:
    if isinstance(wanted, float) and isinstance(given, (int, float)):
        both_nan = math.isnan(wanted) and math.isnan(given)
        return both_nan or math.isclose(wanted, given, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return bool(wanted == given)


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in a JSON value."""
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def manifest_of(name: str, about: dict[str, Any]) -> TaskManifest:
    """What the metrics must know of a task, from the report; prompts play no part."""
    labels = tuple(about["labels"]) if about["labels"] is not None else None
    kind, metrics = about["kind"], tuple(about["metrics"])
    return TaskManifest(name, about["lamp_id"], kind, "", (), labels, metrics, 0, about["generated"])


def _other_configuration(root: Path, report: dict[str, Any]) -> list[str]:
    """Whether `config.yaml` says what the report says; a run that was begun anew has another."""
    path = root / "config.yaml"
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ["config.yaml: missing"]
    found = []
    if configuration_digest(raw) != report["config_digest"]:
        found.append("config.yaml: not the configuration that the report was made with; run it again")
    if raw["chosen_by"] != report["chosen_by"]:
        found.append("config.yaml: chosen_by is not what the report says; run it again")
    return found


def _changed_files(root: Path, methods: Sequence[str], sums: dict[str, str]) -> list[str]:
    """Files of predictions that are not what the report was made from."""
    path = root / sums["file"]
    if not path.exists() or _sha256(path) != sums["sha256"]:
        return [f"{sums['file']}: missing, or not what report.json was written with"]
    before = {file: digest for digest, file in (line.split("  ", 1) for line in path.read_text().splitlines())}
    now = {file: digest for digest, file in (line.split("  ", 1) for line in _sums_of(root, methods).splitlines())}
    return [
        f"{file}: changed, new or gone"
        for file in sorted(before.keys() | now.keys())
        if before.get(file) != now.get(file)
    ]
