"""`proper-ds check`: everything that can be known before training, as lines of text.

Prepares the data where that is not done yet (that is how it is checked), loads no weights, starts no worker.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from proper_ds.checks import trained_stages
from proper_ds.data.manifest import Manifest
from proper_ds.data.prepare import prepare
from proper_ds.data.prepared import PreparedData
from proper_ds.data.prompts import PromptEncoder, history_prompt
from proper_ds.distributed.ds_config import read_ds_file, zero_stage
from proper_ds.errors import AdapterError, ConfigError, Problem
from proper_ds.evaluation.floor_base import sklearn_parts
from proper_ds.evaluation.floors import is_fitted
from proper_ds.evaluation.methods import needs_of
from proper_ds.evaluation.protocol import users_of
from proper_ds.model.base import attention_window, find_targets, load_tokenizer
from proper_ds.model.lora import LoraLayout
from proper_ds.observe.progress import ProgressView
from proper_ds.pipeline.roster import keep_roster, known_before
from proper_ds.pipeline.stage import Stage
from proper_ds.pipeline.stages import StageList, prepared_path
from proper_ds.run_folder import RunFolder
from proper_ds.training.anchors import anchors_among
from proper_ds.training.create_base import llama_config
from proper_ds.training.persona_inputs import check_room

if TYPE_CHECKING:
    from proper_ds.config import RunConfig
    from proper_ds.model.config import LoraSettings

NUM_SAMPLED_USERS = 300
ROW_BYTES = 12
"""A number of an adapter and its two moments, in fp32."""
STORED_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def plan_lines(config: RunConfig, view: ProgressView) -> list[str]:
    """The plan of a run.

    Raises:
        UserError: for anything in data or base that would stop the run later.
    """
    stages = StageList(config)
    folder = RunFolder(config.output_path)
    with _prepared(config, stages, folder, view) as path:
        return _lines(config, stages, folder, path)


def _lines(config: RunConfig, stages: StageList, folder: RunFolder, prepared: Path) -> list[str]:
    manifest = Manifest.read(prepared)
    lines = [f"run folder   {config.output_dir}"]
    for split, counts in manifest.splits.items():
        lines.append(f"split {split:<7}{counts['num_users']:,} users, {counts['num_queries']:,} questions")
    cold = f"{manifest.num_cold_users:,} without history"
    num_users = manifest.num_users - manifest.num_empty
    lines.append(f"users        {num_users:,} ({cold}), {manifest.num_history_items:,} history items")
    for kind, count in manifest.set_aside.items():
        if count:
            lines.append(f"set aside    {count:,} ({kind}), listed in problems.jsonl where the data is prepared")
    for name, task in manifest.tasks.items():
        labels = f"{len(task.labels)} labels" if task.labels else "open answers"
        lines.append(f"task         {name}: {task.lamp_id}, {labels}" + (", GENERATED data" if task.generated else ""))
    lm = check_inputs(config, PreparedData(prepared))
    size = sum(p.numel() for p in lm.parameters())
    up_to = "up to " if config.base.create else ""  # the tokenizer may find fewer words
    lines.append(f"base         {config.base.model or 'created here'}: {type(lm).__name__}, {up_to}{size:,} parameters")
    lines.append(_tokens_line(config, manifest, prepared))
    lines += _adapter_lines(config, lm, manifest)
    lines += _worker_lines(config)
    lines.append("stages       " + ", ".join(_state(stage, folder) for stage in stages))
    return lines


def check_inputs(config: RunConfig, prepared: PreparedData, evaluates: bool = True) -> Any:
    """What only data and base together can tell, before anything is trained; returns the base's modules.

    Args:
        evaluates: whether questions are to be answered, so that there must be some.

    Raises:
        UserError: where the data lacks a split or somebody to merge from, the base lacks a targeted module or is too
            short, or a package is missing.
    """
    manifest, needs = prepared.manifest, needs_of(config)
    problems = _split_problems(config, manifest, evaluates)
    if problems:
        raise ConfigError("data", problems)
    if needs.merged:
        anchors_among(*_history_and_splits(prepared, config), config)
    if any(is_fitted(task, needs.floors) for task in manifest.tasks.values()):
        sklearn_parts()
    lm = skeleton(config)
    for name in ("population", "group", "user", *(["plora"] if needs.plora else [])):
        try:
            lora = getattr(config, name).lora
            find_targets(lm, lora.target_modules, lora.layers)
        except AdapterError as error:
            problems.append(Problem(f"{name}.lora", str(error), "Use some of these."))
    if needs.pplugs:
        try:
            check_room(lm, config.base.max_length)
        except AdapterError as error:
            problems.append(Problem("base.max_length", str(error), "Or leave method PPlug out."))
    window = attention_window(lm.config)
    several_in_a_row = {
        "population.packing": config.population.packing and needs.population,
        "group.packing": config.group.packing and bool(needs.presets),
        "user.share_prefix": config.user.share_prefix and bool(needs.adapter_sets),
    }
    for key in (key for key, asked in several_in_a_row.items() if asked):
        if window is not None and config.base.max_length > window:
            wrong = f"cannot be kept: the base's attention looks back {window} tokens, base.max_length is"
            mend = f"Set `{key}: false`, or base.max_length to at most {window}."
            problems.append(Problem(key, f"{wrong} {config.base.max_length}", mend))
    if problems:
        raise ConfigError(f"base {config.base.model or 'created here'}", problems)
    return lm


def _history_and_splits(prepared: PreparedData, config: RunConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By user: number of history items, whether they are training users, whether they are asked."""
    train, asked = (users_of(prepared, split) for split in (config.data.train_split, config.evaluation.split))
    counts, without = [], []
    for shard in prepared.manifest.shards:
        table = pq.read_table(prepared.folder / shard.file, columns=["num_history", "splits"])
        counts.append(table.column("num_history").to_numpy())
        without.append(pc.list_value_length(table.column("splits")).to_numpy() == 0)
    return np.concatenate(counts), train | np.concatenate(without), asked


def _split_problems(config: RunConfig, manifest: Manifest, evaluates: bool) -> list[Problem]:
    """Splits that are missing, that histories are ahead of, or that hold nothing which a stage could learn from."""
    train, asked = config.data.train_split, config.evaluation.split
    has = ", ".join(manifest.splits) or "none"
    wanted = {"data.train_split": train} | ({"evaluation.split": asked} if evaluates else {})
    problems = [
        Problem(key, f"the data has no questions of split {split!r}", f"It has {has}.")
        for key, split in wanted.items()
        if split not in manifest.splits
    ]
    if evaluates and (num_ahead := manifest.num_users_ahead.get(asked, 0)):
        wrong = f"the histories of {num_ahead} users of split {asked!r} hold what later splits know of them"
        read = f"data.splits=[{train}, {asked}], or --split of `proper-ds data prepare`"
        problems.append(Problem("evaluation.split", wrong, f"Read the data without what comes after {asked}: {read}."))
    if 0 < manifest.splits.get(train, {}).get("num_queries", 0) <= manifest.num_taught_as_history:
        wrong = f"learns from questions alone, and those of split {train!r} are all in later histories"
        mends = {"start": "Set user.start: fresh."}
        problems += [
            Problem(f"{name}.train_on", wrong, mends.get(name, f"Set {name}.train_on: [history]."))
            for name, stage in trained_stages(config)
            if stage.train_on == ["queries"]
        ]
        if needs_of(config).priors:
            mend = "Leave methods that end in +prior out of evaluation.methods."
            problems.append(Problem("prior", wrong, mend))
    return problems


@contextmanager
def _prepared(config: RunConfig, stages: StageList, folder: RunFolder, view: ProgressView) -> Iterator[Path]:
    """The prepared data: the run's own where it is up to date or missing, else a copy that ends with the block.

    So a check spares the run the work, and never moves a result of other settings aside.
    """
    for stage in stages.of("prepare"):
        place = folder.stage(stage.name)
        if place.is_done(stage.fingerprint):
            break
        if place.inputs() is not None:
            with tempfile.TemporaryDirectory(prefix=".check-", dir=folder.root) as copy, view.running():
                prepare(config.data, Path(copy), view.report, known_before(folder, stage))
                yield Path(copy)
            return
        with folder.locked(), view.running():
            place.begin(stage.fingerprint, stage.about)
            prepare(config.data, place.path, view.report, known_before(folder, stage))
            keep_roster(folder, stage)
            place.commit(stage.fingerprint, stage.settings, 0.0, stage.made_from)
    yield prepared_path(config)


def skeleton(config: RunConfig) -> Any:
    """The base's modules without weights. Raises AdapterError where its configuration cannot be loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    create = config.base.create
    if create is not None:
        about = llama_config(create, create.vocab_size)
    else:
        try:
            about = AutoConfig.from_pretrained(config.base.model, revision=config.base.revision)
        except (OSError, ValueError) as error:
            raise AdapterError(f"base.model {config.base.model!r}: {str(error).splitlines()[0][:200]}") from None
        longest = getattr(about, "max_position_embeddings", None)
        if longest is not None and config.base.max_length > longest:
            raise AdapterError(
                f"base.max_length {config.base.max_length} is longer than the {longest} positions of"
                f" {config.base.model!r}; lower base.max_length to at most that"
            )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(about)


def _tokens_line(config: RunConfig, manifest: Manifest, prepared: Path) -> str:
    if config.base.create is not None:
        return "tokens       known once the base's tokenizer is made"
    assert config.base.model is not None
    tokenizer = load_tokenizer(config.base.model, config.base.revision)
    encoder = PromptEncoder(tokenizer, config.base.prompt_suffix, config.base.max_length)
    for task in manifest.tasks.values():
        encoder.label_ids(task)
    num_items = num_tokens = num_cut = 0
    for user in islice(PreparedData(prepared).users(), NUM_SAMPLED_USERS):
        for item in user.history:
            found = encoder.encode(history_prompt(manifest.tasks[item.task], item), item.answer)
            num_items, num_tokens = num_items + 1, num_tokens + len(found.ids)
            num_cut += found.num_cut > 0
    total = num_tokens / max(num_items, 1) * manifest.num_history_items
    cut = f", {num_cut / max(num_items, 1):.1%} of inputs cut to {config.base.max_length}"
    return f"tokens       about {total:,.0f} in all histories (estimated from {num_items:,} items{cut})"


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            return f"{num_bytes:,.1f} {unit}" if unit != "B" else f"{num_bytes:,.0f} B"
        num_bytes /= 1000
    raise AssertionError("unreachable")


def _adapter_lines(config: RunConfig, lm: Any, manifest: Manifest) -> list[str]:
    needs = needs_of(config)

    def layout(settings: LoraSettings) -> LoraLayout:
        return LoraLayout.of(find_targets(lm, settings.target_modules, settings.layers), settings)

    lines = []
    if needs.population:
        lines.append(f"population   LoRA of {layout(config.population.lora).num_parameters:,} numbers")
    if needs.presets:
        experts = layout(config.group.lora)
        total = experts.num_parameters * config.group.num_experts
        lines.append(
            f"group        {config.group.num_experts} experts, {total:,} numbers, for {', '.join(needs.presets)}"
        )
        if "proper-released" in needs.presets:
            wide = sum(m.in_features for m in experts.modules) * (manifest.num_users + 1)
            lines.append(f"             proper-released adds user tables of {wide:,} numbers")
    if needs.adapter_sets:
        user = layout(config.user.lora)
        each = user.num_parameters * STORED_BYTES[config.store.dtype]
        count = manifest.num_users - manifest.num_cold_users
        upto = "up to " if config.user.users == "needed" else ""
        lines.append(
            f"user         LoRA of {user.num_parameters:,} numbers, {_size(each)} each in {config.store.dtype};"
            f" {upto}{count:,} users x {len(needs.adapter_sets)} sets = {_size(each * count * len(needs.adapter_sets))}"
        )
        if needs.joints:
            sampled = min(count, config.joint.max_users or count)
            held = _size(sampled * user.num_parameters * ROW_BYTES)
            lines.append(
                f"joint        up to {sampled:,} of these users trained on, {held} of host memory over all ranks"
            )
    return lines


def _worker_lines(config: RunConfig) -> list[str]:
    ranks, fleet = config.distributed, config.fleet
    lines = []
    if needs_of(config).population:
        stage = zero_stage(read_ds_file(ranks.deepspeed))
        lines.append(f"ranks        {ranks.num_ranks} x {ranks.num_cpus_per_rank} CPU, ZeRO stage {stage}")
    here = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else f"{os.cpu_count()} CPUs"
    actors = f"auto (on this machine alone: {here})" if fleet.num_actors == "auto" else str(fleet.num_actors)
    lines.append(f"actors       {actors}, units of {fleet.num_tokens_per_unit:,} tokens")
    return lines


def _state(stage: Stage, folder: RunFolder) -> str:
    place = folder.stage(stage.name)
    if stage.is_done(folder):
        return f"{stage.name} (kept from {stage.kept_since})" if stage.kept_since else f"{stage.name} (done)"
    if stage.is_update:
        return f"{stage.name} (changed and new users)"
    return f"{stage.name} (again: its inputs changed)" if place.inputs() is not None else stage.name
