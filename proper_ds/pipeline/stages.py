"""The stages of a run as data: what each is made from, as a fingerprint, and which stages stand before it.

A stage whose folder holds a result with the same fingerprint is skipped; see `run.py`. With `user.only_changed`,
complete shared stages keep the fingerprint they have, and stores are brought up to date; see `kept.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proper_ds.data.manifest import Manifest
from proper_ds.data.prepare import describe_sources
from proper_ds.data.recipe import PromptRecipe
from proper_ds.data.sources import find_sources
from proper_ds.distributed.ds_config import read_ds_file, said_of_optimizer
from proper_ds.evaluation.configuration import configuration_digest
from proper_ds.evaluation.methods import LaneNeeds, methods_of, needs_of
from proper_ds.evaluation.test_reads import TestData
from proper_ds.files import digest_of
from proper_ds.model.base import base_fingerprint
from proper_ds.model.presets import preset_of
from proper_ds.pipeline.kept import IDLE, KEPT_STEPS, Kept
from proper_ds.pipeline.stage import Stage, Where
from proper_ds.run_folder import RunFolder, in_lane
from proper_ds.training.config import PROPER_ONLY, learned_by
from proper_ds.training.set_plan import ASKED, NUM_ANCHORS, ROUTER_USERS, SPLITS

if TYPE_CHECKING:
    from proper_ds.config import RunConfig

STEPS = (
    "prepare",
    "base",
    "profiles",
    "tokens",
    "population",
    "features",
    "embeddings",
    "pplug",
    "plora",
    "group",
    "start",
    "user",
    "router",
    "prior",
    "floors",
    "evaluate",
    "report",
)
"""What people call the stages; some stand for several folders."""

ANSWERING = ("floors", "evaluate")
"""Steps that answer the questions of `evaluation.split`."""
ENCODER = ("encoder", "encoder_revision", "pooling", "query_prefix")
"""Settings of `pplug` that its embeddings depend on."""
TOKENS_VERSION = 2
"""Counts up where the same data makes other prompts than before: 2 cuts them alike whatever their answer."""
RECIPES_VERSION = 3
"""The same for prompts by recipe: 3 keeps the items that fit where not all do."""
FLOORS_VERSION = 2
"""The same for floors: 2 learns from people without any question, too, as all other stages do."""
SHARED = ("prepared", "base")
"""Stages that all lanes have in common."""


def _dump(section: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(section.model_dump_json())  # keys of text, as they are when read back
    return found


class StageList:
    """The stages that a configuration's methods need, in order; built once a run."""

    def __init__(self, config: RunConfig, sources: Sequence[dict[str, Any]] | None = None) -> None:
        """Reads the input files' digests.

        Args:
            sources: stand for what the input files are, for comparisons of settings; then no file of data is read.

        Raises:
            UserError: where data or base cannot be found, or settings changed that `user.only_changed` holds fixed.
        """
        self._config = config
        self._kept = Kept(config)
        self._prints: dict[str, str] = {}
        self._order = ""  # which user has which index; the same for all stages
        self.stages: list[Stage] = []
        needs = needs_of(config)
        self._inputs(sources)
        for lane in needs.lanes:
            self._add_lane(lane)
        self._add_evaluation()
        self._kept.settle()

    def _add_lane(self, needs: LaneNeeds) -> None:
        """The stages that train under one kind of prompts."""
        config, lane = self._config, needs.recipe.lane
        self._add_tokens(needs.recipe)
        if needs.population:
            settings = self._rank_settings("population")
            self._add("population", "population", "ranks", settings, ["tokens"], self._origin(lane), lane=lane)
        stages = needs.stages(config.group.user_vector)
        if in_lane("features", lane) in stages:
            dtype = {"dtype": config.base.dtype, "num_tokens_per_unit": config.fleet.num_tokens_per_unit}
            data = ["tokens"] if self._kept.data_changed else []
            self._add("features", "features", "fleet", dtype, ["population", *data], lane=lane)
        self._add_rivals(needs)
        for preset in needs.presets:
            self._add_group(preset, lane)
        for adapter_set in needs.starts:
            self._add_start(adapter_set, lane)
        for adapter_set in needs.adapter_sets:
            self._add_store(adapter_set, needs)
        for preset in needs.routers:
            before = [f"group/{preset}", f"store/{preset}"]
            self._add(f"router/{preset}", "router", "ranks", self._rank_settings("router"), before, lane=lane)
        for preset in needs.joints:
            settings = self._rank_settings("joint") | {"stored_as": config.store.dtype}
            before = [f"group/{preset}", f"store/{preset}"]
            self._add(f"store/{preset}-joint", "router", "ranks", settings, before, lane=lane)
        for name in needs.priors:
            self._add_prior(name, lane)

    def __iter__(self) -> Any:
        return iter(self.stages)

    @property
    def test_data(self) -> list[TestData]:
        """The data sets that the run reads, wherever they lie and however they are prepared."""
        prepared, given = self.of("prepare"), self._config.data.prepared
        if prepared:
            sources, folders = prepared[0].settings["sources"], list[Path]()
        else:
            assert given is not None
            sources, folders = Manifest.read(Path(given)).sources, [Path(given)]
        return [TestData.of(source["path"], source["files"], folders) for source in sources]

    def of(self, *steps: str) -> list[Stage]:
        """The stages that belong to the given steps, in order."""
        return [stage for stage in self.stages if stage.step in steps]

    def _add_rivals(self, needs: LaneNeeds) -> None:
        """Learned user tokens and PLoRA."""
        config, lane = self._config, needs.recipe.lane
        if needs.pplugs:
            encoder = {key: _dump(config.pplug)[key] for key in ENCODER}
            if encoder["encoder"] is not None:
                encoder["encoder_files"] = base_fingerprint(encoder["encoder"], encoder["encoder_revision"])
            encoder |= {"dtype": config.base.dtype, "num_tokens_per_unit": config.fleet.num_tokens_per_unit}
            self._add("embeddings", "embeddings", "fleet", encoder, ["tokens"], lane=lane)
        for name in needs.pplugs:
            settings = {key: value for key, value in self._rank_settings("pplug").items() if key not in ENCODER}
            before = ["population"] if name == "pplug/population" else []
            self._add(name, "pplug", "ranks", settings, ["tokens", "embeddings", *before], lane=lane)
        if needs.plora:
            self._add("plora", "plora", "ranks", self._rank_settings("plora"), ["population"], lane=lane)

    def _add(
        self,
        name: str,
        step: str,
        where: Where,
        settings: dict[str, Any],
        before: list[str],
        also: dict[str, Any] | None = None,
        lane: str = "",
    ) -> None:
        """A stage of a lane.

        Args:
            name, before: within the lane.
            also: is written down with the result, and is no part of the fingerprint.
        """
        prints = {other: self._print_of(other, lane) for other in before}
        made_from = prints | {"order": self._order} | (also or {})
        fingerprint, since = digest_of(name, settings, list(prints.values())), ""
        name = in_lane(name, lane)
        marker = self._kept.marker(name, settings, made_from) if step in KEPT_STEPS else None
        if marker is not None:
            fingerprint, since = marker["fingerprint"], marker["finished"] if self._kept.data_changed else ""
        self._prints[name] = fingerprint
        earlier = tuple(self._full_name(other, lane) for other in before)
        self.stages.append(Stage(name, step, where, settings, earlier, fingerprint, made_from, since))

    def _print_of(self, name: str, lane: str) -> str:
        """Fingerprint of a stage of the lane, or of one that all lanes share."""
        return self._prints[self._full_name(name, lane)]

    @staticmethod
    def _full_name(name: str, lane: str) -> str:
        return name if name in SHARED else in_lane(name, lane)

    def _inputs(self, sources: Sequence[dict[str, Any]] | None) -> None:
        config, data = self._config, self._config.data
        if data.prepared is not None:
            self._prints["prepared"] = self._order = digest_of(_manifest_digest(config))
        else:
            found = describe_sources(find_sources(data)) if sources is None else list(sources)
            self._add_prepared(_dump(data) | {"sources": found})
        if config.base.create is not None:
            self._add(
                "base",
                "base",
                "driver",
                _dump(config.base.create)
                | {"seed": config.seed, "suffix": config.base.prompt_suffix, "train_split": config.data.train_split},
                ["prepared"],
            )
        else:
            assert config.base.model is not None
            self._prints["base"] = base_fingerprint(config.base.model, config.base.revision)
        self._kept.check_base(self._prints["base"])

    def _add_tokens(self, recipe: PromptRecipe) -> None:
        config = self._config
        settings: dict[str, Any] = {
            "max_length": config.base.max_length,
            "prompt_suffix": config.base.prompt_suffix,
            "train_split": config.data.train_split,
            "max_new_tokens": config.evaluation.max_new_tokens,
            "version": TOKENS_VERSION if recipe.is_plain else RECIPES_VERSION,
        }
        before = ["prepared", "base"]
        if not recipe.is_plain:
            settings["recipe"] = recipe.settings(config.seed)
        if recipe.profile == "model":
            assert recipe.profile_model is not None, "checks.py sees to it"
            model = base_fingerprint(recipe.profile_model, recipe.profile_revision)
            about = {
                "model": model,
                "num_tokens_per_unit": config.fleet.num_tokens_per_unit,
                "dtype": config.base.dtype,
            }
            about |= {key: value for key, value in settings["recipe"].items() if key.startswith(("profile", "seed"))}
            self._add("profiles", "profiles", "fleet", about, ["prepared"], lane=recipe.lane)
            before.append("profiles")
        self._add("tokens", "tokens", "driver", settings, before, lane=recipe.lane)
        if self._kept:
            self._kept.compare("tokens", self._kept.made_from["text"], _text(settings))
            self._kept.data_changed |= self._prints["tokens"] != self._kept.made_from["tokens"]

    def _add_prepared(self, settings: dict[str, Any]) -> None:
        """The prepared data. In an update its users keep the places that the kept stages know: its `order`."""
        fingerprint = digest_of("prepared", settings, [])
        order = self._kept.made_from["order"] if self._kept else fingerprint
        if not (order == fingerprint and (not self._kept or self._is_there("prepared", fingerprint))):
            fingerprint = digest_of("prepared", settings, [order])
        self._order = order
        self._kept.data_changed = bool(self._kept) and self._kept.made_from["prepared"] != fingerprint
        self._prints["prepared"] = fingerprint
        self.stages.append(Stage("prepared", "prepare", "driver", settings, (), fingerprint, {"order": order}))

    def _is_there(self, name: str, fingerprint: str) -> bool:
        return RunFolder(self._config.output_path).stage(name).is_done(fingerprint)

    def _rank_settings(self, section: str) -> dict[str, Any]:
        config = self._config
        return learned_by(_dump(getattr(config, section))) | {
            "seed": config.seed,
            "dtype": config.base.dtype,
            "optimizer": said_of_optimizer(read_ds_file(config.distributed.deepspeed)),
            "train_split": config.data.train_split,
        }

    def _origin(self, lane: str) -> dict[str, Any]:
        """What the population stage writes down, so that later nights know what they keep."""
        tokens = next(stage for stage in self.stages if stage.name == in_lane("tokens", lane))
        return {
            "prepared": self._prints["prepared"],
            "base": self._prints["base"],
            "text": _text(tokens.settings),
        }

    def _add_group(self, preset: str, lane: str) -> None:
        settings = self._rank_settings("group")
        before, chosen = ["population"], preset_of(preset, self._config.group.user_vector)
        if chosen.user_vector == "encoder":
            before.append("features")
        if chosen.gate == "double_softmax":
            settings = {key: value for key, value in settings.items() if key not in PROPER_ONLY}
        self._add(f"group/{preset}", "group", "ranks", settings, before, lane=lane)

    def _add_prior(self, name: str, lane: str) -> None:
        config, level = self._config, name.removeprefix("prior/")
        settings = _dump(config.prior) | {
            "seed": config.seed,
            "dtype": config.base.dtype,
            "train_split": config.data.train_split,
            "num_tokens_per_unit": config.fleet.num_tokens_per_unit,
        }
        before = ["population"] if level == "population" else ["population", f"group/{level}"]
        before += ["tokens"] if self._kept.data_changed else []  # a fit that was begun on other data is of no use
        self._add(name, "prior", "fleet", settings, before, lane=lane)

    def _add_start(self, adapter_set: str, lane: str) -> None:
        """The start depends on how users train from it, but for what says how their work is cut."""
        user = _dump(self._config.user_for(adapter_set))
        for name in ("only_changed", "users", "max_history_items", "start", *IDLE):
            user.pop(name, None)
        settings = self._rank_settings("start") | {"user": user}
        settings.pop("adapter_sets")
        before = ["population"] if adapter_set == "OPPU" else ["population", f"group/{adapter_set}"]
        self._add(f"start/{adapter_set}", "start", "ranks", settings, before, lane=lane)

    def _add_store(self, adapter_set: str, needs: LaneNeeds) -> None:
        config, lane = self._config, needs.recipe.lane
        is_learned = adapter_set in needs.starts
        settings = _dump(config.user_for(adapter_set))
        settings.pop("only_changed")
        settings.pop("start")  # said by the stages before it
        settings |= {
            "seed": config.seed,
            "dtype": config.base.dtype,
            "stored_as": config.store.dtype,
            "num_tokens_per_unit": config.fleet.num_tokens_per_unit,
        }
        if config.user.users == "needed":
            settings[SPLITS] = [config.data.train_split, config.evaluation.split]
            if adapter_set not in needs.answering:
                settings[ASKED] = False
            if adapter_set in (*needs.routers, *needs.joints):
                settings[ROUTER_USERS] = [config.router.users, config.router.max_users]
            if adapter_set == "OPPU" and needs.merged:
                settings[NUM_ANCHORS] = config.merge.num_anchors
        before = ["population"] if adapter_set == "OPPU" else ["population", f"group/{adapter_set}"]
        before += [f"start/{adapter_set}"] if is_learned else []
        name = in_lane(f"store/{adapter_set}", lane)
        prints = {other: self._print_of(other, lane) for other in [*before, "tokens"]}
        made_from = prints | {"order": self._order}
        begun = self._kept.begun(name, settings, made_from)
        if begun is None:
            data = ["tokens"] if self._kept.data_changed else []
            fingerprint = digest_of(f"store/{adapter_set}", settings, [prints[other] for other in [*before, *data]])
        elif begun["made_from"]["tokens"] == prints["tokens"] and begun["settings"] == settings:
            fingerprint = begun["fingerprint"]
        else:
            fingerprint = digest_of(name, settings, list(made_from.values()), begun["fingerprint"])
        self._prints[name] = fingerprint
        earlier = tuple(self._full_name(other, lane) for other in [*before, "tokens"])
        made = Stage(name, "user", "fleet", settings, earlier, fingerprint, made_from, is_update=begun is not None)
        self.stages.append(made)

    def _add_evaluation(self) -> None:
        config, evaluation = self._config, self._config.evaluation
        names = ("split", "closed_labels", "ordinal", "max_new_tokens")
        settings = {name: _dump(evaluation)[name] for name in names}
        settings |= {"dtype": config.base.dtype, "num_tokens_per_unit": config.fleet.num_tokens_per_unit}
        methods = methods_of(config)
        for method in methods:
            if method.kind == "merged":
                self._add(
                    f"predictions/{method.name}", "evaluate", "fleet", settings | _dump(config.merge), method.stages
                )
            elif method.kind == "floor":
                own = {"split": evaluation.split, "train_split": config.data.train_split, "seed": config.seed}
                own |= {"max_examples": evaluation.max_floor_examples, "version": FLOORS_VERSION}
                self._add(f"predictions/{method.name}", "floors", "driver", own, method.stages)
            else:
                self._add(f"predictions/{method.name}", "evaluate", "fleet", settings, method.stages)
        bootstrap = {name: _dump(evaluation)[name] for name in ("num_bootstrap_samples", "confidence")}
        bootstrap["references"] = evaluation.compared_with
        raw = _dump(config)
        told = bootstrap | {"configuration": configuration_digest(raw), "chosen_by": raw["chosen_by"]}
        self._add("report", "report", "driver", told, [f"predictions/{method.name}" for method in methods])


def _text(settings: dict[str, Any]) -> dict[str, Any]:
    """The part of the tokens' settings that histories depend on."""
    return {name: value for name, value in settings.items() if name != "max_new_tokens"}


def _manifest_digest(config: RunConfig) -> Any:
    assert config.data.prepared is not None
    manifest = Manifest.read(Path(config.data.prepared))
    return [[shard.digest for shard in manifest.shards], [asdict(task) for task in manifest.tasks.values()]]


def prepared_path(config: RunConfig) -> Path:
    """Where the run's prepared data is."""
    return Path(config.data.prepared) if config.data.prepared else config.output_path / "prepared"
