"""Works through the runs of a study, one after the other; `proper-ds compare` calls it.

A run that fails is noted and does not keep the others from running. What is finished, and what is not, is written to
`study.json` before the tables are made, so that tables of a part are known as such.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from proper_ds.data.generate import generate
from proper_ds.errors import ConfigError, Problem, ProperError, StudyError, UserError
from proper_ds.evaluation.configuration import configuration_hash
from proper_ds.evaluation.test_reads import TEST, TestReads
from proper_ds.files import write_json_atomic
from proper_ds.observe.log import get_logger, log_to_file
from proper_ds.observe.progress import ProgressView
from proper_ds.pipeline.run import Run
from proper_ds.run_folder import RunFolder
from proper_ds.study.adopt import adopt
from proper_ds.study.cluster import SharedCluster
from proper_ds.study.config import GENERATED_FOLDER, GeneratedData, StudyConfig
from proper_ds.study.finished import STATE, FinishedRun
from proper_ds.study.plan import PlannedRun
from proper_ds.study.tables import write_results

DoRun = Callable[[PlannedRun], None]
"""Does one run to its report, or raises."""


@dataclass(frozen=True)
class Failure:
    """Why a run has no report."""

    run: PlannedRun
    error: Exception

    def __str__(self) -> str:
        """A line for people."""
        return f"{self.run.name}: {self.error or type(self.error).__name__}"


def run_all(
    planned: Sequence[PlannedRun], do: DoRun, folder: Path, write: Callable[[Sequence[FinishedRun], Path], None]
) -> tuple[list[FinishedRun], list[Failure]]:
    """Do every run, whatever becomes of the others, and write down after each how far the study is.

    Args:
        write: makes the study's tables; called once, also where the study is stopped.
    """
    finished, failures = list[FinishedRun](), list[Failure]()
    try:
        for number, run in enumerate(planned, start=1):
            get_logger().info("%s: begins, run %d of %d", run.name, number, len(planned))
            start_s = time.perf_counter()
            try:
                do(run)
                finished.append(finished_run(run))
                get_logger().info("%s: done in %.0f s", run.name, time.perf_counter() - start_s)
            except Exception as error:
                failures.append(Failure(run, error))
                if isinstance(error, ProperError):
                    get_logger().error("%s: failed: %s", run.name, error)
                else:
                    get_logger().exception("%s: failed", run.name)
            _write_state(planned, finished, failures, folder)
    finally:
        if finished:
            write(finished, folder)
    return finished, failures


def finished_run(run: PlannedRun) -> FinishedRun:
    """What the tables need of a run that has its report."""
    root = run.config.output_path
    report: dict[str, Any] = json.loads((root / "report.json").read_text(encoding="utf-8"))
    seconds = float(sum(report["stages"].values()))
    return FinishedRun(run.task, run.variant, run.seed, root, report, report["config_digest"], seconds)


def _write_state(
    planned: Sequence[PlannedRun], finished: Sequence[FinishedRun], failures: Sequence[Failure], folder: Path
) -> None:
    done = {run.folder: run for run in finished}
    failed = {failure.run.config.output_path: str(failure.error) for failure in failures}
    lines = []
    for run in planned:
        root, line = run.config.output_path, {"task": run.task, "variant": run.variant, "seed": run.seed}
        line |= {"folder": str(root), "state": "open"}
        if root in done:
            line |= {"state": "done", "seconds": done[root].seconds, "config_hash": done[root].config_hash}
        elif root in failed:
            line |= {"state": "failed", "error": failed[root]}
        lines.append(line)
    write_json_atomic(folder / STATE, {"is_partial": len(done) < len(planned), "runs": lines})


def compare(
    study: StudyConfig, planned: Sequence[PlannedRun], view: ProgressView, again: bool, command: str
) -> tuple[list[FinishedRun], list[Failure]]:
    """Do the whole study, tables included, and return what is finished and what failed; a second call finds it done.

    Args:
        again: whether test users may be read for other configurations than before.
        command: the command line, which the tables tell.

    Raises:
        UserError: before anything is run, where several configurations would read the same test users.
    """
    folder = Path(study.output_dir)
    if not again:
        check_test_reads(planned)
    with ExitStack() as stack:
        stack.enter_context(RunFolder(folder).locked())
        for task, wanted in study.generate.items():
            generate_data(wanted, folder / GENERATED_FOLDER / task)
        shared = SharedCluster(stack)
        roots = [run.config.output_path for run in planned]

        def job_of(run: PlannedRun) -> Run | None:
            """The run where it is not done, with what it can take over from others."""
            log_to_file(RunFolder(run.config.output_path).logs, "driver")
            job = Run(run.config, view, shared.join, TestReads([run.config.output_path, folder], again))
            if job.is_done():
                return None
            adopt(run.config, job.stages, roots)
            return job

        def do(run: PlannedRun) -> None:
            if (job := job_of(run)) is not None:
                job.run()

        if not (folder / STATE).exists():
            _write_state(planned, [], [], folder)
        check_data(planned, job_of)
        return run_all(planned, do, folder, partial(write_results, command=command))


def check_data(planned: Sequence[PlannedRun], job_of: Callable[[PlannedRun], Run | None]) -> None:
    """Prepare the data of every run that is not done before the first one trains.

    Raises:
        UserError: naming every run whose data is refused, or does not have what its configuration asks for.
    """
    failures = []
    for run in planned:
        try:
            if (job := job_of(run)) is not None:
                job.check_data()
        except UserError as error:
            failures.append(Failure(run, error))
    if failures:
        lines = "\n".join(f"  {failure}" for failure in failures)
        raise UserError(
            f"{len(failures)} of {len(planned)} runs cannot begin, and none was begun\n{lines}\n"
            "In a study, the setting `a.b` of all runs is `run.a.b`, that of one task `tasks.NAME.a.b`"
        )


def raise_for(failures: Sequence[Failure], num_planned: int) -> None:
    """Raise one error that names every run that failed: a UserError where nothing but the user can mend any of it."""
    if not failures:
        return
    lines = "\n".join(f"  {failure}" for failure in failures)
    text = f"{len(failures)} of {num_planned} runs failed, and the tables are PARTIAL\n{lines}"
    if all(isinstance(failure.error, UserError) for failure in failures):
        raise UserError(text)
    raise StudyError(f"{text}\nRun the same command again to go on")


def check_test_reads(planned: Sequence[PlannedRun]) -> None:
    """Raises ConfigError where several configurations would read the same test users."""
    by_task: dict[str, dict[str, str]] = {}
    for run in planned:
        if run.config.evaluation.split == TEST:
            by_task.setdefault(run.task, {}).setdefault(
                configuration_hash(run.config.model_dump(mode="json")), run.name
            )
    problems = [
        Problem(task, f"{' and '.join(runs.values())} would all read its test users", "Keep one, or give --again.")
        for task, runs in by_task.items()
        if len(runs) > 1
    ]
    if problems:
        raise ConfigError("test users are read once", problems)


def generate_data(wanted: GeneratedData, out: Path) -> None:
    """Generate a task's data where it is not there yet; whole or not at all.

    Raises:
        UserError: where data of other numbers is there.
    """
    about = {"num_users": wanted.num_users, "num_groups": wanted.num_groups, "seed": wanted.seed}
    if out.exists():
        infos = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*/info.json"))]
        if any({name: info.get(name) for name in about} != about for info in infos):
            raise UserError(
                f"{out} was generated with other numbers than {about}; give another output_dir, or delete it"
            )
        return
    unfinished = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    for _ in generate(wanted.num_users, wanted.num_groups, wanted.seed, unfinished):
        pass
    unfinished.rename(out)
    get_logger().info("generated %d users in %d groups: %s", wanted.num_users, wanted.num_groups, out)
