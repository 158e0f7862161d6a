"""Runs what is not done yet, step after step (see `steps.py`), and commits it. The command line calls `run`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING

import torch

from proper_ds.erasure.forget import check_nothing_pending
from proper_ds.errors import UserError
from proper_ds.evaluation.test_reads import TestReads
from proper_ds.files import write_json_atomic
from proper_ds.fleet.cluster import Cluster, ray_cluster
from proper_ds.observe.log import get_logger
from proper_ds.observe.metrics import MetricsFile
from proper_ds.observe.progress import ProgressView
from proper_ds.pipeline.plan import check_inputs
from proper_ds.pipeline.record import record_run
from proper_ds.pipeline.stage import Stage
from proper_ds.pipeline.stages import ANSWERING, STEPS, StageList
from proper_ds.pipeline.steps import Steps
from proper_ds.run_folder import RunFolder, split_lane
from proper_ds.store.elsewhere import open_store, point_to
from proper_ds.store.files import open_files
from proper_ds.training.context import RunContext, base_dtype

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
        kept_since = {stage.name: stage.kept_since for stage in self.stages if stage.kept_since}
        self._steps = Steps(self.context, view, self.cluster, kept_since)

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
            if any(not self._is_done(stage) for stage in self.stages.of(*ANSWERING) if stage.step in chosen):
                self._reads.check(self.config, self.stages.test_data)
            record_run(self.config, self.folder)
            if self.config.store.location is not None:
                open_files(self.config.store.location)  # refuses places where two writers could both win
            self._say_what_is_kept()
            on_ranks: list[Stage] = []  # of steps that follow each other: they share the start of a gang
            for step in STEPS:
                missing = self._missing(step, chosen)
                if missing and missing[0].where == "ranks":
                    on_ranks += missing
                elif missing:
                    self._do(on_ranks)
                    self._do(missing)
                    on_ranks = []
            self._do(on_ranks)
        return self.is_done()

    def check_data(self) -> None:
        """Prepare the data, and check what only data and base together can tell; trains nothing.

        Raises:
            UserError: for data that is refused, or that does not have what the configuration asks for.
        """
        self.run(["prepare"])
        check_inputs(self.config, self.context.prepared)
        self._is_checked = True

    def _missing(self, step: str, chosen: set[str]) -> list[Stage]:
        """The stages of a step that are to be done. Raises UserError where a later step needs others of it."""
        wanted = self.stages.of(step)
        missing = [stage for stage in wanted if not self._is_done(stage)]
        if step in chosen:
            if wanted and not missing:
                get_logger().info("%s: done already", step)
            return missing
        later = [other for other in STEPS[STEPS.index(step) + 1 :] if other in chosen]
        if missing and later:
            raise UserError(
                f"step {later[0]} needs {step}, which is not done, or was made from other inputs; add it to --steps"
            )
        return []

    def is_done(self) -> bool:
        """Whether every stage has a result of exactly this configuration, the report included."""
        return all(self._is_done(stage) for stage in self.stages)

    def _is_done(self, stage: Stage) -> bool:
        return stage.is_done(self.folder)

    def _say_what_is_kept(self) -> None:
        for stage in self.stages:
            if stage.kept_since:
                get_logger().info("%s: kept as it was made on %s, from earlier data", stage.name, stage.kept_since)
            if stage.where == "ranks" and self._is_done(stage):
                self._say_other_batch(stage)

    def _say_other_batch(self, stage: Stage) -> None:
        """Without `train_batch_size` the global batch follows the number of ranks, which makes no result anew."""
        section = "joint" if split_lane(stage.name)[0].endswith("-joint") else stage.step
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

    def _do(self, missing: list[Stage]) -> None:
        """Do stages of one step, or of several that run on ranks; nothing where there are none."""
        if not missing:
            return
        step = "+".join(dict.fromkeys(stage.step for stage in missing))
        if step not in ("prepare", "report") and not self._is_checked:
            check_inputs(self.config, self.context.prepared, self._evaluates)
            self._is_checked = True
        for stage in missing:
            if self._begin(stage):
                get_logger().warning("%s: made from other inputs; the old result is in superseded/", stage.name)
        if step in ANSWERING:
            self._reads.record(self.config, self.stages.test_data)
        names = ", ".join(stage.name for stage in missing)
        what = step if names == step else f"{step} ({names})"
        get_logger().info("%s: begins", what)
        start_s = time.perf_counter()
        with self.view.running():
            self._steps.do(missing)
        seconds = time.perf_counter() - start_s
        if missing[0].where != "ranks":  # ranks commit each of their stages themselves
            for stage in missing:
                own_s = self._steps.unit_seconds.get(stage.name, seconds / len(missing))
                self.folder.stage(stage.name).commit(stage.fingerprint, stage.settings, own_s, stage.made_from)
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


def _checked_steps(steps: Sequence[str] | None) -> set[str]:
    if not steps:
        return set(STEPS)
    unknown = [step for step in steps if step not in STEPS]
    if unknown:
        raise UserError(f"unknown step {', '.join(unknown)}; legal are {', '.join(STEPS)}")
    return set(steps)
