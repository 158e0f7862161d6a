"""Runs what is not done yet: driver work here, ranks and actors through the fleet. The command line calls `run`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from proper_ds.data.prepare import prepare
from proper_ds.data.prompts import PromptEncoder
from proper_ds.data.tokens import tokenize
from proper_ds.distributed.checkpoint import Checkpoints
from proper_ds.erasure.forget import check_nothing_pending
from proper_ds.errors import UserError
from proper_ds.evaluation.test_reads import TestReads
from proper_ds.files import write_json_atomic
from proper_ds.fleet.cluster import Cluster, ray_cluster
from proper_ds.fleet.controller import Controller
from proper_ds.fleet.gang import run_gang
from proper_ds.fleet.plan import Unit, plan_units
from proper_ds.fleet.policy import FailurePolicy
from proper_ds.fleet.pool import ray_pool
from proper_ds.observe.log import get_logger
from proper_ds.observe.metrics import MetricsFile
from proper_ds.observe.progress import ProgressView, follow_metrics
from proper_ds.pipeline.plan import check_inputs
from proper_ds.pipeline.quarantine import give_up_unit
from proper_ds.pipeline.record import record_run
from proper_ds.pipeline.roster import keep_roster, known_before
from proper_ds.pipeline.stages import STEPS, Stage, StageList
from proper_ds.run_folder import RunFolder
from proper_ds.store.elsewhere import open_store, point_to
from proper_ds.store.files import open_files
from proper_ds.training.context import RunContext, base_dtype
from proper_ds.training.create_base import create_base
from proper_ds.training.features import is_written
from proper_ds.training.rank_stage import CHECKPOINT
from proper_ds.training.selection import num_tokens, users_with_queries
from proper_ds.training.set_plan import ensure_plan, users_to_train

if TYPE_CHECKING:
    from proper_ds.config import RunConfig


class Run:
    """One run as the driver sees it."""

    def __init__(
        self,
        config: RunConfig,
        view: ProgressView,
        join: Callable[[], AbstractContextManager[Cluster]] = ray_cluster,
        reads: TestReads | None = None,
    ) -> None:
        """Reads the input files' digests.

        Args:
            join: gives the Ray cluster when the first stage needs it; several runs may share one.
            reads: the ledgers of test users; the run's own alone by default.
        """
        self.config, self.view = config, view
        self.folder = RunFolder(config.output_path)
        self._join, self._reads = join, reads or TestReads([self.folder.root])
        self.context = RunContext(config, torch.device("cpu"))
        self.stages = StageList(config)
        self.metrics = MetricsFile(self.folder.metrics)
        self._stack: ExitStack | None = None
        self._cluster: Cluster | None = None
        self._is_checked, self._evaluates = False, True

    def run(self, steps: Sequence[str] | None = None) -> bool:
        """Do every stage that is not done, or only those of `steps`; True where the report is up to date then.

        Raises:
            UserError: where a step is unknown, or lacks the result of one before it.
        """
        chosen = _checked_steps(steps)
        self._evaluates = "evaluate" in chosen
        with ExitStack() as stack:
            self._stack = stack
            stack.enter_context(self.folder.locked())
            check_nothing_pending(self.folder.root)
            if self._evaluates and not all(self._is_done(stage) for stage in self.stages.of("evaluate")):
                self._reads.check(self.config, self.stages.data_digest)
            record_run(self.config, self.folder)
            if self.config.store.location is not None:
                open_files(self.config.store.location)  # refuses places where two writers could both win
            self._say_what_is_kept()
            for step in STEPS:
                wanted = self.stages.of(step)
                missing = [stage for stage in wanted if not self._is_done(stage)]
                if not missing:
                    if wanted and step in chosen:
                        get_logger().info("%s: done already", step)
                    continue
                if step not in chosen:
                    later = [other for other in STEPS[STEPS.index(step) + 1 :] if other in chosen]
                    if later:
                        raise UserError(
                            f"step {later[0]} needs {step}, which is not done, or was made from other inputs; add it"
                            " to --steps"
                        )
                    continue
                self._do(step, missing)
        return self.is_done()

    def is_done(self) -> bool:
        """Whether every stage has a result of exactly this configuration, the report included."""
        return all(self._is_done(stage) for stage in self.stages)

    def _is_done(self, stage: Stage) -> bool:
        return self.folder.stage(stage.name).is_done(stage.fingerprint)

    def _say_what_is_kept(self) -> None:
        for stage in self.stages:
            if stage.kept_since:
                get_logger().info("%s: kept as it was made on %s, from earlier data", stage.name, stage.kept_since)
            if stage.where == "ranks" and self._is_done(stage):
                self._say_other_batch(stage)

    def _say_other_batch(self, stage: Stage) -> None:
        """Without `train_batch_size` the global batch follows the number of ranks, which makes no result anew."""
        section = "joint" if stage.name.endswith("-joint") else stage.step
        now = getattr(self.config, section).global_batch_size(self.config.distributed.num_ranks)
        made_from = (self.folder.stage(stage.name).inputs() or {}).get("made_from", {})
        was = made_from.get("train_batch_size", now)  # results of earlier versions do not say
        if was != now:
            warning = (
                "%s: kept, though it had %d examples in an optimizer step, which the configuration now makes %d; %s"
            )
            mend = f"set {section}.train_batch_size, which is the same on any number of ranks"
            get_logger().warning(warning, stage.name, was, now, mend)

    def cluster(self) -> Cluster:
        """The Ray cluster; joined or started when the first stage needs it."""
        if self._cluster is None:
            assert self._stack is not None
            self._cluster = self._stack.enter_context(self._join())
            get_logger().info("Ray: %s", self._cluster)
            self._settle_dtype(self._cluster.on_gpu)
        return self._cluster

    def _settle_dtype(self, on_gpu: bool) -> None:
        """Keep a run that `base.dtype: auto` began in one type from going on in another, unit by unit."""
        now = str(base_dtype(self.config.base, on_gpu)).removeprefix("torch.")
        path = self.folder.root / "dtype.json"
        if path.exists():
            begun = json.loads(path.read_text(encoding="utf-8"))
            if self.config.base.dtype == "auto" and begun != now:
                raise UserError(
                    f"base.dtype auto means {now} here, but {self.folder.root} was begun in {begun} on another kind of"
                    " machine; go on there, or give another output_dir"
                )
        write_json_atomic(path, now)

    def _do(self, step: str, missing: list[Stage]) -> None:
        if step not in ("prepare", "report") and not self._is_checked:
            check_inputs(self.config, self.context.prepared.manifest, self._evaluates)
            self._is_checked = True
        for stage in missing:
            if self._begin(stage):
                get_logger().warning("%s: made from other inputs; the old result is in superseded/", stage.name)
        names = ", ".join(stage.name for stage in missing)
        what = step if names == step else f"{step} ({names})"
        get_logger().info("%s: begins", what)
        start_s = time.perf_counter()
        do: dict[str, Callable[[list[Stage]], None]] = {
            "prepare": self._prepare,
            "base": self._base,
            "tokens": self._tokens,
            "population": self._ranks,
            "features": self._features,
            "group": self._ranks,
            "user": self._users,
            "router": self._ranks,
            "evaluate": self._evaluate,
            "report": self._report,
        }
        with self.view.running():
            do[step](missing)
        seconds = time.perf_counter() - start_s
        if missing[0].where != "ranks":  # ranks commit each of their stages themselves
            for stage in missing:
                place = self.folder.stage(stage.name)
                place.commit(stage.fingerprint, stage.settings, seconds / len(missing), stage.made_from)
        self.metrics.log(step, event="done", seconds=seconds)
        get_logger().info("%s: done in %.1f s", what, seconds)

    def _begin(self, stage: Stage) -> bool:
        """Make a stage's folder ready; True where a result of other inputs was moved aside."""
        place, about = self.folder.stage(stage.name), stage.about
        if stage.step == "user":
            # a night that committed nothing has used up its number all the same: its plan is there
            begun = (place.begun() or {}).get("version", 0) if stage.is_update else 0
            newest = open_store(place.path).last_version() if stage.is_update else 0
            about = about | {"version": max(newest, begun) + 1}
        was_moved = place.begin(stage.fingerprint, about, stage.is_update)
        if stage.name.startswith("store/"):
            point_to(place.path, self.config.store.location)
        return was_moved

    def _prepare(self, stages: list[Stage]) -> None:
        known = known_before(self.folder, stages[0])
        manifest = prepare(self.config.data, self.folder.stage("prepared").path, self.view.report, known)
        keep_roster(self.folder, stages[0])
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
        assert self.config.base.create is not None
        name = stages[0].name

        def on_step(step: int, num_steps: int, loss: float) -> None:
            self.metrics.log(name, step=step, num_steps=num_steps, loss=loss)
            self.view.report(name, step, num_steps, f"loss {loss:.4f}")

        out = self.folder.stage(name).path
        base = self.config.base
        size = create_base(
            self.context.prepared, self.config.base.create, out, base.prompt_suffix, self.config.seed, on_step
        )
        get_logger().info("base: a Llama of %s parameters", f"{size:,}")

    def _tokens(self, stages: list[Stage]) -> None:
        base = self.config.base
        encoder = PromptEncoder(self.context.tokenizer, base.prompt_suffix, base.max_length)
        tokenize(
            self.context.prepared,
            encoder,
            self.folder.stage("tokens").path,
            self.config.data.train_split,
            self.config.evaluation.max_new_tokens,
            self.view.report,
        )
        marker = self.context.tokens.marker
        get_logger().info("%s examples, %s tokens", f"{marker['num_examples']:,}", f"{marker['num_tokens']:,}")
        if marker["num_cut"]:
            get_logger().warning(
                "%d of %d inputs were cut to base.max_length %d",
                marker["num_cut"],
                marker["num_examples"],
                base.max_length,
            )

    def _ranks(self, stages: list[Stage]) -> None:
        options = {"stages": [[s.name, s.fingerprint, s.settings, s.made_from] for s in stages]}
        entry = "proper_ds.training.rank_jobs:run_stages"

        def progress() -> str:
            return self._rank_progress(stages)

        with follow_metrics(self.folder.metrics, self.view):
            run_gang(entry, self.config, options, stages[0].step, self.cluster(), progress)

    def _rank_progress(self, stages: list[Stage]) -> str:
        """What ranks would go on from: the first stage that is not done, and its newest checkpoint."""
        for number, stage in enumerate(stages):
            if not self._is_done(stage):
                found = Checkpoints(self.folder.stage(stage.name).path / CHECKPOINT, stage.fingerprint, 1)
                step = found.newest_step()
                return f"step {step} of {stage.name}" if step else (stage.name if number else "")
        return "the end"

    def _features(self, stages: list[Stage]) -> None:
        folder = self.folder.stage("features").path
        units = self._units(np.ones(self.context.tokens.num_users, dtype=bool), empty_too=True)
        pending = [unit for unit in units if not is_written(folder, unit.first)]
        self._fleet("proper_ds.training.unit_jobs:FeaturesJob", {}, "features", units, pending)

    def _users(self, stages: list[Stage]) -> None:
        if not users_to_train(self.context).any():
            raise UserError(
                "step user: no user has history to learn from; check the data, or drop the personal methods"
            )
        places = {stage.name.removeprefix("store/"): self.folder.stage(stage.name) for stage in stages}
        plans = {name: ensure_plan(self.context, place) for name, place in places.items()}
        units = [unit for name, plan in plans.items() for unit in self._units(plan.chosen, part=name)]
        stores = {name: open_store(place.path) for name, place in places.items()}
        done = {name: stores[name].units(plan.version) for name, plan in plans.items()}
        pending = [unit for unit in units if unit.name not in done[unit.part]]
        if not units:
            get_logger().info("user: no history changed, so no adapter is trained")

        def quarantine(unit: Unit, reason: str) -> None:
            give_up_unit(self.context, unit, plans[unit.part], reason)

        options = {"stores": {name: str(store.location) for name, store in stores.items()}}
        self._fleet("proper_ds.training.unit_jobs:UsersJob", options, "user", units, pending, quarantine)

    def _evaluate(self, stages: list[Stage]) -> None:
        mask = users_with_queries(self.context.tokens, self.config.evaluation.split)
        if not mask.any():
            splits = ", ".join(self.context.prepared.manifest.splits) or "none"
            raise UserError(
                f"step evaluate: split {self.config.evaluation.split!r} has no questions; the data has {splits}"
                " (evaluation.split)"
            )
        self._reads.record(self.config, self.stages.data_digest)
        folder = self.folder.stage("predictions").path / "units"
        units = self._units(mask)
        pending = [unit for unit in units if not (folder / f"{unit.name}.parquet").exists()]
        options = {"methods": list(self.config.evaluation.methods)}
        self._fleet("proper_ds.evaluation.predict_job:PredictJob", options, "evaluate", units, pending)

    def _report(self, stages: list[Stage]) -> None:
        from proper_ds.evaluation.report import write_report

        write_report(self.context, {stage.name: stage.kept_since for stage in self.stages if stage.kept_since})

    def _units(self, mask: np.ndarray, part: str = "", empty_too: bool = False) -> list[Unit]:
        """Units of the masked users by their tokens; at least one token a user where those without count too."""
        cost = num_tokens(self.context.tokens)
        if empty_too:
            cost = np.maximum(cost, 1)
        return plan_units(cost * mask, self.config.fleet.num_tokens_per_unit, part)

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
            self.metrics.log(step, unit=unit.name, part=unit.part, **report)
            note = f"loss {report['last_loss']:.4f}" if report.get("last_loss") is not None else ""
            self.view.report(step, done, total, note)

        def on_quarantined(unit: Unit, reason: str) -> None:
            assert quarantine is not None
            quarantine(unit, reason)
            on_done(unit, {"quarantined": reason})

        if pending:
            fleet = self.config.fleet
            policy = FailurePolicy(fleet.max_retries, int(fleet.max_quarantined_share * total) if quarantine else 0)
            with ray_pool(entry, self.config, options, step, self.cluster()) as pool:
                Controller(pending, pool, policy, on_done, on_quarantined if quarantine else None).run()
        assert done == total, f"{step}: {done} of {total} users are committed"


def _checked_steps(steps: Sequence[str] | None) -> set[str]:
    if not steps:
        return set(STEPS)
    unknown = [step for step in steps if step not in STEPS]
    if unknown:
        raise UserError(f"unknown step {', '.join(unknown)}; legal are {', '.join(STEPS)}")
    return set(steps)
