"""The report of a run: `report.json` with every number, `report.md` and `report.html` for people, LaMP's own files.

Called by the run's last stage; everything is read from what earlier stages committed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from proper_ds.evaluation.answers import read_answers
from proper_ds.evaluation.gates import gate_history
from proper_ds.evaluation.grouping import grouping_of, read_truth
from proper_ds.evaluation.methods import methods_of, stages_of
from proper_ds.evaluation.metrics import metrics_of
from proper_ds.evaluation.report_html import html_of
from proper_ds.evaluation.report_text import markdown_of
from proper_ds.evaluation.results import (
    answers_of,
    evaluate_task,
    expert_use,
    mean_gates,
    read_predictions,
    write_lamp_files,
)
from proper_ds.evaluation.test_reads import num_reads
from proper_ds.files import digest_of, write_json_atomic, write_text_atomic
from proper_ds.observe.metrics import read_events
from proper_ds.run_folder import in_lane
from proper_ds.store.elsewhere import open_store
from proper_ds.store.store import AdapterStore

if TYPE_CHECKING:
    from proper_ds.config import RunConfig
    from proper_ds.training.context import RunContext


def write_report(context: RunContext, kept: Mapping[str, str]) -> dict[str, Any]:
    """Make all of the report's files and return what report.json holds.

    Args:
        kept: by stage, when a result was made that was kept although the data changed since.
    """
    root = context.folder.root
    folder, methods = root / "predictions", list(context.config.evaluation.methods)
    for method in methods:
        write_lamp_files(read_answers(folder / method), context.prepared.manifest.tasks, folder / method)
    found = build_report(context, read_predictions(folder, methods)) | {"kept": dict(kept)}
    write_text_atomic(root / "report.html", html_of(found, _events(context, stages_of(context.config))))
    write_text_atomic(root / "report.md", markdown_of(found))
    write_json_atomic(root / "report.json", found)
    return found


def build_report(context: RunContext, table: pa.Table) -> dict[str, Any]:
    """All numbers of the report."""
    config, manifest = context.config, context.prepared.manifest
    names: list[str] = list(config.evaluation.methods)
    tasks: dict[str, Any] = {}
    for name, task in manifest.tasks.items():
        answers = answers_of(table, name, names)
        if not answers.ids:
            continue
        tasks[name] = evaluate_task(task, answers, config.evaluation) | {
            "lamp_id": task.lamp_id,
            "kind": task.kind,
            "generated": task.generated,
            "metrics": {metric.name: metric.higher_is_better for metric in metrics_of(task)},
        }
    stages = stages_of(config)
    methods = {m: {name: task["methods"].pop(m) for name, task in tasks.items()} for m in names}
    return {
        "run": str(context.folder.root),
        "protocol": {
            "split": config.evaluation.split,
            "closed_labels": config.evaluation.closed_labels,
            "ordinal": config.evaluation.ordinal,
            "confidence": config.evaluation.confidence,
            "num_bootstrap_samples": config.evaluation.num_bootstrap_samples,
        },
        "base": context.base_name,
        "config_digest": digest_of(config.model_dump(mode="json")),
        "versions": json.loads((context.folder.root / "versions.json").read_text(encoding="utf-8")),
        "methods": methods,
        "method_notes": {method.name: method.says for method in methods_of(config)},
        "tasks": tasks,
        "users": _users(context, config),
        "experts": expert_use(table, names),
        "grouping": _grouping(context, table, names),
        "gates": gate_history(_events(context, stages)),
        "router_jumps": _router_jumps(context, stages),
        "stages": _seconds(context, stages),
        "set_aside": manifest.set_aside,
        "test_reads": num_reads(context.folder.root),
        "chosen_by": config.chosen_by.model_dump(mode="json") if config.chosen_by else None,
    }


def _grouping(context: RunContext, table: pa.Table, methods: list[str]) -> dict[str, Any]:
    truth = read_truth([str(source["path"]) for source in context.prepared.manifest.sources])
    if not truth:
        return {}
    by_method = {
        method: ([context.keys[user] for user in users], gates)
        for method, (users, gates) in mean_gates(table, methods).items()
    }
    return grouping_of(by_method, truth)


def _users(context: RunContext, config: RunConfig) -> dict[str, Any]:
    manifest = context.prepared.manifest
    sets = {}
    methods = methods_of(config)
    owned = [(m.lane, name) for m in methods for name in (m.adapter_set, m.own_set) if name is not None]
    for name in dict.fromkeys(in_lane(name, lane) for lane, name in owned):
        store = open_store(context.folder.stage(f"store/{name}").path)
        users = store.users()
        num_bytes = store.stats().pack_bytes
        sets[name] = {
            "num_adapters": len(users),
            "num_by_version": dict(sorted(Counter(_version(store, user) for user in users).items())),
            "num_failed": len(store.failures()),
            "num_bytes": num_bytes,
            "bytes_per_user": num_bytes / len(users) if users else 0,
        }
    num_users = manifest.num_users - manifest.num_empty
    return {"num_users": num_users, "num_cold_users": manifest.num_cold_users, "sets": sets}


def _version(store: AdapterStore, user: str) -> int:
    entry = store.entry(user)
    assert entry is not None, f"{user!r} is listed and has no entry"
    return entry.version


def _events(context: RunContext, stages: Collection[str]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that the stages wrote."""
    return [event for event in read_events(context.folder.metrics)[0] if event["stage"] in stages]


def _router_jumps(context: RunContext, stages: Collection[str]) -> list[dict[str, Any]]:
    events = _events(context, stages)
    last = {event["stage"]: event for event in events if event.get("event") == "gates exchanged"}
    return [
        {"stage": stage, "loss_user_gates": event["loss_user_gates"], "loss_lora_gates": event["loss_lora_gates"]}
        for stage, event in last.items()
    ]


def _seconds(context: RunContext, stages: Collection[str]) -> dict[str, float]:
    """Seconds of each of the stages that was done here, by its folder."""
    done = {name: context.folder.stage(name).inputs() for name in stages}
    return {name: float(inputs["seconds"]) for name, inputs in done.items() if inputs is not None}
