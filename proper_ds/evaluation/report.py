"""The report of a run: `report.json` with every number, `report.md` and `report.html` for people, LaMP's own files.

Called by the run's last stage; everything is read from what earlier stages committed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from proper_ds.evaluation.answers import read_answers
from proper_ds.evaluation.cautions import answer_cautions, prior_cautions, run_cautions, taught_by_asked
from proper_ds.evaluation.configuration import configuration_digest
from proper_ds.evaluation.costs import Work, costs_of, work_of
from proper_ds.evaluation.gates import gate_history
from proper_ds.evaluation.grouping import grouping_of, read_truth
from proper_ds.evaluation.label_prior import load_priors
from proper_ds.evaluation.methods import Method, methods_of, needs_of, needs_of_methods, stages_of
from proper_ds.evaluation.prior_fit import tasks_with_prior
from proper_ds.evaluation.protocol import protocol_of
from proper_ds.evaluation.published import published_for
from proper_ds.evaluation.questions import PREDICTIONS, read_predictions
from proper_ds.evaluation.report_html import html_of
from proper_ds.evaluation.report_text import markdown_of
from proper_ds.evaluation.results import Scoring, expert_use, mean_gates, score_tasks, write_lamp_files
from proper_ds.evaluation.state import bytes_per_user
from proper_ds.evaluation.test_reads import num_reads
from proper_ds.evaluation.verify import by_method, write_sums
from proper_ds.files import write_json_atomic, write_text_atomic
from proper_ds.observe.metrics import read_events
from proper_ds.run_folder import in_lane, split_lane
from proper_ds.store.elsewhere import open_store
from proper_ds.store.store import AdapterStore
from proper_ds.training.set_plan import Role

if TYPE_CHECKING:
    from proper_ds.config import RunConfig
    from proper_ds.training.context import RunContext


def write_report(context: RunContext, kept: Mapping[str, str]) -> dict[str, Any]:
    """Make all of the report's files and return what report.json holds.

    Args:
        kept: by stage, when a result was made that was kept although the data changed since.
    """
    root = context.folder.root
    methods = list(context.config.evaluation.methods)
    for method in methods:
        folder = root / PREDICTIONS / method
        write_lamp_files(read_answers(folder), context.prepared.manifest.tasks, folder)
    found = build_report(context, read_predictions(root, methods)) | {"kept": dict(kept)}
    write_text_atomic(root / "report.html", html_of(found, _events(context, stages_of(context.config))))
    write_text_atomic(root / "report.md", markdown_of(found))
    write_json_atomic(root / "report.json", found)
    return found


def build_report(context: RunContext, table: pa.Table) -> dict[str, Any]:
    """All numbers of the report.

    Every score is computed from the files that `predictions` names, under the configuration of `config_digest`;
    `verify.py` does it again. `methods` holds scores [method][task][metric]; `costs` what each method cost; `tasks`
    the rest that is known of each task (see `evaluate_task`), with figures that others published for it; `prompts` what
    was cut from prompts or found no room in them, by lane; `priors` the label priors [method][task].
    """
    config, manifest = context.config, context.prepared.manifest
    names = list(config.evaluation.methods)
    scored = by_method(score_tasks(table, manifest.tasks, names, Scoring.of(config.evaluation)), names)
    protocol, prompts = protocol_of(context), _prompts(context)
    taught = taught_by_asked(config, protocol["share_of_users_also_in_training"])
    protocol["cautions"] += run_cautions(config, prompts, taught) + answer_cautions(table, names)
    protocol["cautions"] += prior_cautions(config, manifest.tasks, tasks_with_prior(context.prepared))
    for name, about in scored["tasks"].items():
        about["protocol"] = protocol["name"]
        about["published"] = published_for(name, manifest, protocol["name"], protocol["base"])
    stages = stages_of(config)
    return {
        "run": str(context.folder.root),
        "protocol": protocol,
        "base": context.base_name,
        "config_digest": configuration_digest(config.model_dump(mode="json")),
        "predictions": write_sums(context.folder.root, names),
        "versions": json.loads((context.folder.root / "versions.json").read_text(encoding="utf-8")),
        **scored,
        "prompts": prompts,
        "taught_by_asked": taught,
        "method_notes": {method.name: method.says for method in methods_of(config)},
        "costs": _costs(context),
        "users": _users(context, config),
        "experts": expert_use(table, names),
        "grouping": _grouping(context, table, names),
        "priors": _priors(context),
        "gates": gate_history(_events(context, stages)),
        "router_jumps": _router_jumps(context, stages),
        "stages": _seconds(context, stages),
        "set_aside": manifest.set_aside,
        "test_reads": num_reads(context.folder.root),
        "chosen_by": [choice.model_dump(mode="json") for choice in config.chosen_by],
    }


def _prompts(context: RunContext) -> dict[str, dict[str, dict[str, int]]]:
    """What the tokens counted of their prompts, by lane; "" is the plain one."""
    lanes = [lane.recipe.lane for lane in needs_of(context.config).lanes]
    markers = {lane: replace(context, lane=lane).tokens.marker for lane in lanes}
    return {lane: marker.get("prompts", {}) for lane, marker in markers.items()}  # tokens of earlier versions: unknown


def _priors(context: RunContext) -> dict[str, dict[str, Any]]:
    found = {}
    for method in methods_of(context.config):
        if method.prior_stage is not None:
            priors = load_priors(replace(context, lane=method.lane).stage(method.prior_stage).path)
            found[method.name] = {task: asdict(prior) for task, prior in priors.items()}
    return found


def _grouping(context: RunContext, table: pa.Table, methods: list[str]) -> dict[str, Any]:
    truth = read_truth([str(source["path"]) for source in context.prepared.manifest.sources])
    if not truth:
        return {}
    by_method = {
        method: ([context.keys[user] for user in users], gates)
        for method, (users, gates) in mean_gates(table, methods).items()
    }
    return grouping_of(by_method, truth)


def _costs(context: RunContext) -> dict[str, Any]:
    methods = methods_of(context.config)
    behind = {method.name: _stages_behind(method, context.config) for method in methods}
    events, works = read_events(context.folder.metrics)[0], dict[str, Work]()
    for stage in {stage for stages in behind.values() for stage in stages}:
        marker = context.folder.stage(stage).inputs()
        if marker is not None:
            works[stage] = work_of(stage, marker, events)
    for floor in (method.name for method in methods if method.kind == "floor"):
        seconds = (context.folder.stage(f"{PREDICTIONS}/{floor}").inputs() or {}).get("seconds", 0.0)
        behind[floor], works[f"{PREDICTIONS}/{floor}"] = [f"{PREDICTIONS}/{floor}"], Work(seconds, 0)
    kept = {method.name: bytes_per_user(context, method) for method in methods}
    return costs_of(behind, works, kept, events, {method.name: _role_of(method) for method in methods})


def _role_of(method: Method) -> Role:
    """Which users' adapters a method needs, where only those that are needed are trained."""
    if method.kind == "merged":
        return "merged"
    return "router" if method.router or method.joint_set else "asked"


def _stages_behind(method: Method, config: RunConfig) -> list[str]:
    """The stages that had to be trained or computed for a method, in order; preparing the data is everybody's."""
    needs = needs_of_methods([method], config.learned_sets)
    lanes = [stage for lane in needs.lanes for stage in lane.stages(config.group.user_vector)]
    return [stage for stage in lanes if split_lane(stage)[0] != "tokens"]


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
