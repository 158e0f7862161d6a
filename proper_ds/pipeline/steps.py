"""What each step of a run does: driver work here, ranks and actors through the fleet. `run.py` says what is missing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from proper_ds.data.prepare import prepare
from proper_ds.data.prompt_maker import maker_for
from proper_ds.data.prompts import PromptEncoder
from proper_ds.data.tokens import PROMPT_COUNTS, tokenize
from proper_ds.distributed.checkpoint import Checkpoints
from proper_ds.errors import UserError
from proper_ds.evaluation import prior_fit
from proper_ds.evaluation.answers import has_answers, write_answers
from proper_ds.evaluation.floors import predict_floors
from proper_ds.evaluation.methods import methods_of, needs_of
from proper_ds.fleet.cluster import Cluster
from proper_ds.fleet.controller import Controller
from proper_ds.fleet.gang import run_gang
from proper_ds.fleet.plan import Unit, plan_units
from proper_ds.fleet.policy import FailurePolicy
from proper_ds.fleet.pool import ray_pool
from proper_ds.observe.log import get_logger
from proper_ds.observe.metrics import MetricsFile
from proper_ds.observe.progress import ProgressView, follow_metrics
from proper_ds.pipeline.quarantine import give_up_unit
from proper_ds.pipeline.roster import keep_roster, known_before
from proper_ds.pipeline.stage import Stage
from proper_ds.run_folder import in_lane, split_lane
from proper_ds.store.elsewhere import open_store
from proper_ds.training import embeddings
from proper_ds.training.context import RunContext
from proper_ds.training.create_base import create_base
from proper_ds.training.features import is_written
from proper_ds.training.rank_stage import CHECKPOINT
from proper_ds.training.selection import num_tokens, users_with_queries
from proper_ds.training.set_plan import ensure_plan, roles_in, users_to_train

TOKENS_PER_PROFILE = 2_000
"""What a user counts for in units whose users' profiles a model writes."""
_COUNTED = ("num_examples", "num_tokens")
_PRIOR_LOGGED = ("prior_items", "weight", "num_questions", "nll_before", "nll_after", "nll_shares")
_SHORT_OF_ROOM = {
    "num_cut": "were cut to",
    "num_bare": "show nothing of what their recipe puts there, for want of room in",
    "num_no_items": "show a profile and none of the items found, for want of room in",
    "num_fewer_items": "show fewer items than were found, for want of room in",
}
"""What the log warns of, by what the tokens count."""


class Steps:
    """The work of a run's steps on stages that were begun; the caller commits them.

    Attributes:
        unit_seconds: by stage of the step done last, what its units took the actors; of a floor, what it took here.
    """

    def __init__(
        self,
        context: RunContext,
        view: ProgressView,
        cluster: Callable[[], Cluster],
        kept_since: dict[str, str],
    ) -> None:
        """`cluster` joins or starts Ray when it is first called; `kept_since` is told in the report."""
        self._context, self._config, self._folder = context, context.config, context.folder
        self._view, self._cluster, self._kept_since = view, cluster, kept_since
        self._metrics = MetricsFile(self._folder.metrics)
        self.unit_seconds: dict[str, float] = {}

    def do(self, stages: list[Stage]) -> None:
        """Do stages of one step, or of several that run on ranks, in order."""
        self.unit_seconds = {}
        do: dict[str, Callable[[list[Stage]], None]] = {
            "prepare": self._prepare,
            "base": self._base,
            "profiles": self._profiles,
            "tokens": self._tokens,
            "population": self._ranks,
            "features": self._features,
            "embeddings": self._embeddings,
            "pplug": self._ranks,
            "plora": self._ranks,
            "group": self._ranks,
            "start": self._ranks,
            "user": self._users,
            "router": self._ranks,
            "prior": self._priors,
            "floors": self._floors,
            "evaluate": self._evaluate,
            "report": self._report,
        }
        do[stages[0].step](stages)

    def _prepare(self, stages: list[Stage]) -> None:
        known = known_before(self._folder, stages[0])
        manifest = prepare(self._config.data, self._folder.stage("prepared").path, self._view.report, known)
        keep_roster(self._folder, stages[0])
        about = ", ".join(f"{name} {n['num_users']}/{n['num_queries']}" for name, n in manifest.splits.items())
        get_logger().info(
            "%d users, %d history items; users/questions by split: %s",
            manifest.num_users - manifest.num_empty,
            manifest.num_history_items,
            about,
        )
        for kind, count in manifest.set_aside.items():
            if count:
                get_logger().warning("%d set aside as %s; see problems.jsonl", count, kind)
        if manifest.num_forgotten:
            get_logger().warning("%d forgotten users stand in the data still; left out", manifest.num_forgotten)

    def _base(self, stages: list[Stage]) -> None:
        config, create, name = self._config, self._config.base.create, stages[0].name
        assert create is not None, "there is no such step where a base is given"

        def on_step(step: int, num_steps: int, loss: float) -> None:
            self._metrics.log(name, step=step, num_steps=num_steps, loss=loss)
            self._view.report(name, step, num_steps, f"loss {loss:.4f}")

        out = self._folder.stage(name).path
        of_run = (config.base.prompt_suffix, config.data.train_split, config.seed)
        size = create_base(self._context.prepared, create, out, *of_run, on_step)
        get_logger().info("base: a Llama of %s parameters", f"{size:,}")

    def _tokens(self, stages: list[Stage]) -> None:
        base, split = self._config.base, self._config.data.train_split
        encoder = PromptEncoder(self._context.tokenizer, base.prompt_suffix, base.max_length)
        recipes = {lane.recipe.lane: lane.recipe for lane in needs_of(self._config).lanes}
        for stage in stages:
            context = self._context_of(stage)
            out, written = context.stage("tokens").path, context.stage("profiles").path / "units"
            recipe = recipes[context.lane]
            maker = maker_for(recipe, context.prepared, encoder, out, written, split, self._config.seed)
            tokenize(
                context.prepared,
                encoder,
                out,
                split,
                self._config.evaluation.max_new_tokens,
                self._view.report,
                maker,
            )
            marker = context.tokens.marker
            get_logger().info("%s: %s examples, %s tokens", stage.name, *(f"{marker[n]:,}" for n in _COUNTED))
            counted = {name: sum(part[name] for part in marker["prompts"].values()) for name in PROMPT_COUNTS}
            for name, what in _SHORT_OF_ROOM.items():
                if counted[name]:
                    text = "%s: %d of %d prompts %s base.max_length %d"
                    about = (stage.name, counted[name], counted["num_prompts"], what, base.max_length)
                    get_logger().warning(text, *about)

    def _profiles(self, stages: list[Stage]) -> None:
        """Units by users, as there are no tokens yet: what a model reads of each is bounded."""
        num_users, per_unit = self._context.prepared.manifest.num_users, self._config.fleet.num_tokens_per_unit
        every = [u for s in stages for u in plan_units(np.full(num_users, TOKENS_PER_PROFILE), per_unit, s.name)]
        pending = [unit for unit in every if not has_answers(self._folder.stage(unit.part).path, unit.name)]
        recipes = {lane.recipe.lane: lane.recipe.model_dump(mode="json") for lane in needs_of(self._config).lanes}
        self._fleet("proper_ds.training.profiles:ProfilesJob", {"recipes": recipes}, "profiles", every, pending)

    def _ranks(self, stages: list[Stage]) -> None:
        options = {"stages": [[s.name, s.fingerprint, s.settings, s.made_from] for s in stages]}
        entry = "proper_ds.training.rank_jobs:run_stages"

        def progress() -> str:
            return self._rank_progress(stages)

        step = "+".join(dict.fromkeys(stage.step for stage in stages))
        with follow_metrics(self._folder.metrics, self._view):
            run_gang(entry, self._config, options, step, self._cluster(), progress)

    def _rank_progress(self, stages: list[Stage]) -> str:
        """What ranks would go on from: the first stage that is not done, and its newest checkpoint."""
        for number, stage in enumerate(stages):
            if not self._folder.stage(stage.name).is_done(stage.fingerprint):
                found = Checkpoints(self._folder.stage(stage.name).path / CHECKPOINT, stage.fingerprint, 1)
                step = found.newest_step()
                return f"step {step} of {stage.name}" if step else (stage.name if number else "")
        return "the end"

    def _features(self, stages: list[Stage]) -> None:
        every, pending = list[Unit](), list[Unit]()
        for stage in stages:
            context = self._context_of(stage)
            units = self._units(context, np.ones(context.tokens.num_users, dtype=bool), stage.name, empty_too=True)
            folder = context.stage("features").path
            every, pending = every + units, pending + [unit for unit in units if not is_written(folder, unit.first)]
        options = {"lanes": [split_lane(stage.name)[1] for stage in stages]}
        self._fleet("proper_ds.training.unit_jobs:FeaturesJob", options, "features", every, pending)

    def _embeddings(self, stages: list[Stage]) -> None:
        (stage,) = stages  # of the plain lane, the only one that has it
        units = self._units(self._context, np.ones(self._context.tokens.num_users, dtype=bool), stage.name, True)
        folder = self._folder.stage(stage.name).path
        pending = [unit for unit in units if not embeddings.is_written(folder, unit.first)]
        self._fleet("proper_ds.training.embeddings_job:EmbeddingsJob", {}, "embeddings", units, pending)

    def _users(self, stages: list[Stage]) -> None:
        places = {stage.name: self._folder.stage(stage.name) for stage in stages}
        contexts = {stage.name: self._context_of(stage) for stage in stages}
        needed = {s.name: roles_in(s.settings) for s in stages}
        if not any(users_to_train(contexts[name], needed[name]).any() for name in contexts):
            raise UserError(
                "step user: no user has history to learn from; check the data, or drop the personal methods"
            )
        plans = {name: ensure_plan(contexts[name], place, needed[name]) for name, place in places.items()}
        units = [unit for name, plan in plans.items() for unit in self._units(contexts[name], plan.chosen, name)]
        stores = {name: open_store(place.path) for name, place in places.items()}
        done = {name: stores[name].units(plan.version) for name, plan in plans.items()}
        pending = [unit for unit in units if unit.name not in done[unit.part]]
        if not units:
            get_logger().info("user: no history changed, so no adapter is trained")

        def quarantine(unit: Unit, reason: str) -> None:
            give_up_unit(contexts[unit.part], unit, plans[unit.part], reason)

        options = {"stores": {name: str(store.location) for name, store in stores.items()}}
        self._fleet("proper_ds.training.unit_jobs:UsersJob", options, "user", units, pending, quarantine)

    def _floors(self, stages: list[Stage]) -> None:
        evaluation = self._config.evaluation
        methods = [stage.name.removeprefix("predictions/") for stage in stages]
        for method in methods:  # one by one, each with the fits it needs, so that each has its own cost
            start_s = time.perf_counter()
            table = predict_floors(
                self._context.prepared,
                evaluation.split,
                self._config.data.train_split,
                [method],
                self._config.seed,
                evaluation.max_floor_examples,
            )
            write_answers(self._folder.stage(f"predictions/{method}").path, "all", table)
            self.unit_seconds[f"predictions/{method}"] = time.perf_counter() - start_s

    def _priors(self, stages: list[Stage]) -> None:
        """The training questions of a sample of users are answered as others are, then the priors are fitted."""
        by_stage = {in_lane(m.prior_stage, m.lane): m.name for m in methods_of(self._config) if m.prior_stage}
        every, pending = list[Unit](), list[Unit]()
        for stage in stages:
            context, folder = self._context_of(stage), self._folder.stage(stage.name).path
            units = self._units(context, prior_fit.choose_asked(context, folder), stage.name)
            every, pending = every + units, pending + [unit for unit in units if not has_answers(folder, unit.name)]
        options = {"priors": {stage.name: by_stage[stage.name] for stage in stages}}
        self._fleet("proper_ds.evaluation.predict_job:PredictJob", options, "prior", every, pending)
        folders = [self._folder.stage(stage.name).path for stage in stages]
        made = prior_fit.finish(self._context.prepared, folders, self._config.data.train_split)
        for stage, priors in zip(stages, made, strict=True):
            for task, found in priors.items():
                about = {name: getattr(found, name) for name in _PRIOR_LOGGED}
                self._metrics.log(stage.name, event="fitted", task=task, **about)
                get_logger().info("%s of %s: %s", stage.name, task, found)
                if found.is_level_worse:
                    warning = (
                        "%s of %s: the level is farther from the golds than everybody's shares are; train it longer"
                    )
                    get_logger().warning(warning, stage.name, task)

    def _evaluate(self, stages: list[Stage]) -> None:
        lanes = {method.name: method.lane for method in methods_of(self._config)}
        every, pending = list[Unit](), list[Unit]()
        for stage in stages:
            context = replace(self._context, lane=lanes[stage.name.removeprefix("predictions/")])
            mask = users_with_queries(context.tokens, self._config.evaluation.split)
            if not mask.any():
                splits = ", ".join(self._context.prepared.manifest.splits) or "none"
                raise UserError(
                    f"step evaluate: split {self._config.evaluation.split!r} has no questions; the data has {splits}"
                    " (evaluation.split)"
                )
            units, folder = self._units(context, mask, stage.name), self._folder.stage(stage.name).path
            every, pending = every + units, pending + [unit for unit in units if not has_answers(folder, unit.name)]
        self._fleet("proper_ds.evaluation.predict_job:PredictJob", {}, "evaluate", every, pending)

    def _context_of(self, stage: Stage) -> RunContext:
        """The run as seen from the stage's lane."""
        return replace(self._context, lane=split_lane(stage.name)[1])

    def _report(self, stages: list[Stage]) -> None:
        from proper_ds.evaluation.report import write_report

        write_report(self._context, self._kept_since)

    def _units(self, context: RunContext, mask: np.ndarray, part: str, empty_too: bool = False) -> list[Unit]:
        """Units of the masked users by their tokens, for the stage called `part`; at least one token a user where
        those without count too."""
        cost = num_tokens(context.tokens)
        if empty_too:
            cost = np.maximum(cost, 1)
        return plan_units(cost * mask, self._config.fleet.num_tokens_per_unit, part)

    def _fleet(
        self,
        entry: str,
        options: dict[str, Any],
        step: str,
        units: list[Unit],
        pending: list[Unit],
        quarantine: Callable[[Unit, str], None] | None = None,
    ) -> None:
        """Have the pending units worked through. `quarantine` commits one that is given up; without it none is."""
        total = sum(unit.num_users for unit in units)
        done = total - sum(unit.num_users for unit in pending)
        if len(pending) < len(units):
            get_logger().info("%s: %d of %d units are committed already", step, len(units) - len(pending), len(units))

        def on_done(unit: Unit, report: dict[str, Any]) -> None:
            nonlocal done
            done += unit.num_users
            self.unit_seconds[unit.part] = self.unit_seconds.get(unit.part, 0.0) + report.get("seconds", 0.0)
            self._metrics.log(step, unit=unit.name, part=unit.part, **report)
            note = f"loss {report['last_loss']:.4f}" if report.get("last_loss") is not None else ""
            self._view.report(step, done, total, note)

        def on_quarantined(unit: Unit, reason: str) -> None:
            assert quarantine is not None
            quarantine(unit, reason)
            on_done(unit, {"quarantined": reason})

        if pending:
            fleet = self._config.fleet
            policy = FailurePolicy(fleet.max_retries, int(fleet.max_quarantined_share * total) if quarantine else 0)
            with ray_pool(entry, self._config, options, step, self._cluster()) as pool:
                Controller(pending, pool, policy, on_done, on_quarantined if quarantine else None).run()
        assert done == total, f"{step}: {done} of {total} users are committed"
