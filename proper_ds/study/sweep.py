"""Runs the trials of a sweep on one Ray cluster and writes down what they gave; `proper-ds sweep` calls it.

Each trial is a driver process of its own, a plain `proper-ds run` that joins the sweep's cluster. A driver within a Ray
task would hold a CPU that its own ranks and actors wait for, and a driver changes its process (signals, log files, Ray
Train's controller), so that two in one process would meet. A process of its own may die, and can be run by hand.

    trials.jsonl        one line whenever a trial ends: values, configuration hash, score or error, seconds
    best.yaml           the best trial's values, and what they were chosen by: `chosen_by` of the run that takes them
    trials/NAME/        a trial's run, with NAME.yaml and NAME.log (what it printed) beside it
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml

from proper_ds.config import RunConfig
from proper_ds.errors import ConfigError, Problem, StudyError, UserError
from proper_ds.files import write_text_atomic
from proper_ds.fleet.cluster import Cluster, join_environment, ray_cluster
from proper_ds.observe.log import get_logger, log_to_file
from proper_ds.observe.progress import ProgressView
from proper_ds.pipeline.run import Run
from proper_ds.pipeline.stage import REPORT
from proper_ds.pipeline.stages import StageList
from proper_ds.run_folder import RunFolder
from proper_ds.study.adopt import adopt
from proper_ds.study.config import SweepConfig
from proper_ds.study.trials import Score, Trial, best_of, choose_metric, score_of

BEST, LOG = "best.yaml", "trials.jsonl"
WAIT_S, STOP_TIMEOUT_S = 0.5, 60.0
TAIL_LINES = 5


class Process:
    """A trial's driver."""

    def __init__(self, trial: Trial, share: RunConfig, environment: dict[str, str]) -> None:
        """Write its configuration and start it; `share` is the configuration with its share of the cluster."""
        folder = trial.config.output_path
        folder.mkdir(parents=True, exist_ok=True)
        path = folder.parent / f"{trial.name}.yaml"
        write_text_atomic(path, yaml.safe_dump(share.model_dump(mode="json"), sort_keys=False))
        self.trial, self._start_s = trial, time.perf_counter()
        self._output = folder.parent / f"{trial.name}.log"
        self._file: TextIO = self._output.open("w", encoding="utf-8")
        command = [sys.executable, "-m", "proper_ds", "run", str(path)]
        self._process = subprocess.Popen(command, stdout=self._file, stderr=subprocess.STDOUT, env=environment)

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.perf_counter() - self._start_s

    def problem(self) -> str:
        """Why an ended process has no result; "" where it ended well."""
        self._file.close()
        if self._process.returncode == 0:
            return ""
        lines = self._output.read_text(encoding="utf-8", errors="replace").splitlines()
        first = next((n for n, line in enumerate(lines) if line.startswith("error:")), max(0, len(lines) - 1))
        told = " ".join(line.strip() for line in lines[first : first + TAIL_LINES])
        return f"exit code {self._process.returncode}: {told}; see {self._output}"

    def stop(self) -> None:
        """End it as Ctrl-C does; what it committed is kept."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._file.close()


@dataclass(frozen=True)
class Result:
    """How a trial ended; without a score it failed."""

    trial: Trial
    score: Score | None
    problem: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """A line of `trials.jsonl`."""
        found = {"trial": self.trial.name, "overrides": self.trial.overrides, "config_hash": self.trial.config_hash}
        score = {} if self.score is None else asdict(self.score)
        return found | score | {"problem": self.problem, "seconds": round(self.seconds, 1)}


def sweep(config: SweepConfig, trials: Sequence[Trial], view: ProgressView) -> tuple[Trial, Score]:
    """Run every trial that has no report yet and write down the best; a second call finds it done.

    Raises:
        ConfigError: where trials together want more than the cluster has.
        StudyError: naming the trials that failed; the best of the others is written all the same.
    """
    folder = Path(config.output_dir)
    with ExitStack() as stack:
        stack.enter_context(RunFolder(folder).locked())
        results = [result for trial in trials if (result := _done_before(trial, config))]
        known = {result.trial.name for result in results}
        left = [trial for trial in trials if trial.name not in known]
        get_logger().info("%d of %d trials are done already", len(results), len(trials))
        if left:
            check_objective(left[0].config, config, view)
            cluster = stack.enter_context(ray_cluster())
            shares = {trial.name: share_of(trial.config, cluster, config.max_concurrent) for trial in left}
            roots = [trial.config.output_path for trial in trials]
            environment = join_environment()

            def start(trial: Trial) -> Process:
                adopt(trial.config, StageList(trial.config), roots)
                return Process(trial, shares[trial.name], environment)

            def on_result(result: Result) -> None:
                _tell(result, folder)

            with view.running():
                results += work_through(left, config, start, view, on_result)
        order = [trial.name for trial in trials]
        return _settle(sorted(results, key=lambda result: order.index(result.trial.name)), config, folder)


def _done_before(trial: Trial, config: SweepConfig) -> Result | None:
    """The result of a trial whose run is done; None where there is still something to do."""
    folder = RunFolder(trial.config.output_path)
    if not (folder.root / REPORT).exists():  # saves reading the data
        return None
    if not all(stage.is_done(folder) for stage in StageList(trial.config)):
        return None
    return Result(trial, score_of(_report(trial), config.objective), "", 0.0)


def check_objective(trial: RunConfig, config: SweepConfig, view: ProgressView) -> None:
    """Prepare the first trial's data, and see whether the objective can be had of it.

    Raises:
        UserError: where the data is refused, or has no such split, task or metric.
    """
    log_to_file(RunFolder(trial.output_path).logs, "driver")
    job = Run(trial, view)
    job.check_data()
    tasks = job.context.prepared.manifest.tasks
    choose_metric({name: task.metrics for name, task in tasks.items()}, config.objective)


def share_of(config: RunConfig, cluster: Cluster, num_parts: int) -> RunConfig:
    """A trial's configuration with its equal part of the cluster: its number of actors, which changes no result.

    Raises:
        ConfigError: where ranks or actors of all parts do not fit side by side: each part would wait for the others.
    """
    fleet, distributed = config.fleet, config.distributed
    most_actors = max(1, cluster.num_fitting(fleet.num_cpus_per_actor) // num_parts)
    most_ranks = cluster.num_fitting(distributed.num_cpus_per_rank) // num_parts
    given: dict[str, int] = {}
    if distributed.num_ranks > most_ranks:
        given["distributed.num_ranks"] = distributed.num_ranks
    if fleet.num_actors != "auto" and fleet.num_actors > most_actors:
        given["fleet.num_actors"] = fleet.num_actors
    if given and cluster.is_ours:  # others may grow
        wrong = f"in each of {num_parts} trials at a time, but {cluster}"
        mend = f"Lower it, or max_concurrent ({num_parts})."
        raise ConfigError("sweep", [Problem(key, f"{number} {wrong}", mend) for key, number in given.items()])
    if fleet.num_actors != "auto" or num_parts == 1:
        return config
    return config.model_copy(update={"fleet": fleet.model_copy(update={"num_actors": most_actors})})


def work_through(
    trials: Sequence[Trial],
    config: SweepConfig,
    start: Callable[[Trial], Process],
    view: ProgressView,
    on_result: Callable[[Result], None],
) -> list[Result]:
    """Keep `max_concurrent` trials at work until all have ended; none is left running however this ends."""
    waiting, running, results = list(trials), list[Process](), list[Result]()
    try:
        while waiting or running:
            while waiting and len(running) < config.max_concurrent:
                running.append(start(waiting.pop(0)))
            for process in [process for process in running if not process.is_running]:
                running.remove(process)
                results.append(_result_of(process, config))
                on_result(results[-1])
            now = ", ".join(process.trial.name for process in running)
            view.report("trials", len(results), len(trials), now)
            time.sleep(WAIT_S if running else 0)
    finally:
        for process in running:
            process.stop()
    return results


def _result_of(process: Process, config: SweepConfig) -> Result:
    problem, score = process.problem(), None
    if not problem:
        try:
            score = score_of(_report(process.trial), config.objective)
        except (OSError, ValueError, KeyError, UserError) as error:
            problem = f"no score: {error}"
    return Result(process.trial, score, problem, process.seconds)


def _report(trial: Trial) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((trial.config.output_path / "report.json").read_text(encoding="utf-8"))
    return found


def _tell(result: Result, folder: Path) -> None:
    values = ", ".join(f"{key}={value}" for key, value in result.trial.overrides.items())
    if result.score is None:
        get_logger().error("%s (%s): failed: %s", values, result.trial.name, result.problem)
    else:
        score, name = result.score, result.trial.name
        told = "%s (%s): %s of %s %.4f, %.0f s"
        get_logger().info(told, values, name, score.metric, score.method, score.value, result.seconds)
    with (folder / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": time.strftime("%Y-%m-%d %H:%M:%S")} | result.to_json()) + "\n")


def _settle(results: Sequence[Result], config: SweepConfig, folder: Path) -> tuple[Trial, Score]:
    """Write `best.yaml`; raise where a trial failed."""
    scored = [(result.trial, result.score) for result in results if result.score is not None]
    failed = [result for result in results if result.score is None]
    lines = "\n".join(f"  {result.trial.name} {result.trial.overrides}: {result.problem}" for result in failed)
    if not scored:
        raise StudyError(f"all {len(failed)} trials failed\n{lines}")
    trial, score = best_of(scored)
    num_tied = sum(other.rank == score.rank for _, other in scored)
    if num_tied > 1:
        text = "%d of %d trials tie at %s %.4f; the first of them was taken, which chooses nothing among them"
        get_logger().warning(text, num_tied, len(scored), score.metric, score.value)
    best = {
        "overrides": trial.overrides,
        "split": config.objective.split,
        "num_trials": len(scored),
        "num_tied": num_tied,
        "trial": trial.name,
        "config_hash": trial.config_hash,
    } | asdict(score)
    write_text_atomic(folder / BEST, yaml.safe_dump(best, sort_keys=False, allow_unicode=True))
    if failed:
        raise StudyError(
            f"{len(failed)} of {len(results)} trials failed; {BEST} is the best of the others\n{lines}\n"
            "Run the same command again to go on"
        )
    return trial, score
