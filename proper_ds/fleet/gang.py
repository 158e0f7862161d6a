"""Ranks through Ray Train: started together, and together again with those that are left when one is lost.

Ray Train starts a gang, watches it and ends it with its first loss; whether and how it starts again is settled here, so
that the driver can say why and with how many ranks. Called by `pipeline/run.py`.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError
from ray.train import FailureConfig, ScalingConfig, TrainingFailedError
from ray.train import RunConfig as TrainRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend

from proper_ds.distributed.config import DistributedConfig
from proper_ds.distributed.ranks import current_ranks
from proper_ds.errors import FleetError, ProperError, UserError
from proper_ds.files import write_json_atomic
from proper_ds.fleet.cluster import Cluster
from proper_ds.fleet.worker import resolve
from proper_ds.observe.log import get_logger, log_to_file
from proper_ds.run_folder import RunFolder

if TYPE_CHECKING:
    from proper_ds.config import RunConfig

ROOM_INTERVAL_S = 2.0
NODE_ID = "ray.io/node-id"
"""Ray's own label of each node."""


def run_gang(
    entry: str, config: RunConfig, options: dict[str, Any], stage: str, cluster: Cluster, progress: Callable[[], str]
) -> None:
    """Run `entry(config, ranks, **options)` on up to `distributed.num_ranks` ranks and wait for the end.

    Args:
        progress: how far the ranks have got and would go on from, for people; "" for the beginning. As long as it
            changes between two losses, ranks may be lost as often as they like.

    Raises:
        UserError: what the entry raised because of its input: tried once.
        FleetError: when ranks failed more often in a row than `distributed.max_restarts`, or there is no room.
    """
    distributed = config.distributed
    failures, before = 0, progress()
    while True:
        num_ranks, nodes = _room(cluster, distributed, stage)
        get_logger().info("%s: %s%s", stage, _ranks(num_ranks), f", from {before}" if before else "")
        try:
            _run_once(entry, config, options, stage, _scaling(num_ranks, nodes, cluster, distributed))
            return
        except (TrainingFailedError, RayError) as error:
            now = progress()
            failures, before = failures + 1 if now == before else 1, now
            if failures > distributed.max_restarts:
                raise FleetError(
                    f"{stage}: {_reason(error)}. That was loss {failures} in a row without a new checkpoint"
                    " (distributed.max_restarts); the logs are in the run's folder. Run again to go on"
                ) from error
            get_logger().warning("%s: %s; starts again from %s", stage, _reason(error), now or "the beginning")


def _room(cluster: Cluster, distributed: DistributedConfig, stage: str) -> tuple[int, list[str]]:
    """(ranks to start, nodes to start them on): as many as fit now, at least `min_ranks`, for which it waits.

    Raises:
        ConfigError: where they do not fit and never will.
        FleetError: where there is no room for `start_timeout_s`.
    """
    deadline_s, told = time.monotonic() + distributed.start_timeout_s, False
    while True:
        now = cluster.now()
        if now.is_ours:
            now.check_ranks(distributed.num_ranks, distributed.num_cpus_per_rank)
        else:
            now = now.answering()
        fitting = min(distributed.num_ranks, now.num_fitting(distributed.num_cpus_per_rank))
        if fitting >= distributed.min_ranks:
            if fitting < distributed.num_ranks:
                get_logger().warning("%s: room for %d of %s: %s", stage, fitting, _ranks(distributed.num_ranks), now)
            return fitting, list(now.nodes)
        if time.monotonic() > deadline_s:
            raise FleetError(
                f"{stage}: no room for {_ranks(distributed.min_ranks)} (distributed.min_ranks) within"
                f" {distributed.start_timeout_s:g} s (distributed.start_timeout_s): {now}. Run again to go on"
            )
        if not told:
            what = "%s: waits for room for %s (distributed.min_ranks); %s"
            get_logger().warning(what, stage, _ranks(distributed.min_ranks), now)
            told = True
        time.sleep(ROOM_INTERVAL_S)


def _ranks(count: int) -> str:
    return f"{count} rank" + ("s" if count != 1 else "")


def _scaling(num_ranks: int, nodes: list[str], cluster: Cluster, distributed: DistributedConfig) -> ScalingConfig:
    """`nodes` keeps ranks off hosts that were cut off, which Ray may take for alive for a while."""
    return ScalingConfig(
        num_workers=num_ranks,
        use_gpu=cluster.on_gpu,
        resources_per_worker={"CPU": distributed.num_cpus_per_rank} | ({"GPU": 1} if cluster.on_gpu else {}),
        label_selector={NODE_ID: f"in({','.join(nodes)})"},
    )


def _reason(error: Exception) -> str:
    """Which ranks were lost, and why, in a line; without those that only failed because of them."""
    failed = getattr(error, "worker_failures", {})
    died = {
        rank: cause.health_check_failure for rank, cause in failed.items() if hasattr(cause, "health_check_failure")
    }
    if not failed:
        return f"ranks could not be run ({_first_line(error)})"
    return "; ".join(f"rank {rank} was lost ({_first_line(cause)})" for rank, cause in sorted((died or failed).items()))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"actor [0-9a-f]{16,}", "actor", lines[0] if lines else type(error).__name__)[:200].rstrip(".:")


def _run_once(entry: str, config: RunConfig, options: dict[str, Any], stage: str, scaling: ScalingConfig) -> None:
    """One gang, to its end or its first loss."""
    distributed = config.distributed
    scratch = config.output_path / ".ray"
    name = f"{stage.replace('/', '-')}-{time.time_ns()}"
    error_file = scratch / f"{name}.error.json"
    scratch.mkdir(parents=True, exist_ok=True)
    trainer = _Trainer(
        _rank_main,
        train_loop_config={
            "entry": entry,
            "config": config,
            "options": options,
            "stage": stage,
            "error_file": str(error_file),
        },
        scaling_config=scaling,
        torch_config=_Torch(
            backend="nccl" if scaling.use_gpu else "gloo", timeout_s=int(distributed.collective_timeout_s)
        ),
        run_config=TrainRunConfig(
            name=name,
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )
    try:
        trainer.fit()
        if error_file.exists():
            raise _as_ours(error_file)
    except (TrainingFailedError, RayError) as error:
        if error_file.exists():
            raise _as_ours(error_file) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class _Trainer(TorchTrainer):
    """Leaves Ctrl-C to Python: `fit` raises KeyboardInterrupt, and what the driver holds open ends with it.

    Ray Train's own handler waits for the ranks (seen to hang), ends the process with code 0, and stays in place for
    everything that runs later.
    """

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


class _Backend(_TorchBackend):
    """Does not ask ranks to take leave of each other, which `_rank_main` has them do themselves.

    A rank that waits for a lost one cannot: Ray Train would give it half a minute before it ends it.
    """

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        pass


class _Torch(TorchConfig):
    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend


def _as_ours(error_file: Path) -> ProperError:
    found = json.loads(error_file.read_text(encoding="utf-8"))
    kind = UserError if found["is_users"] else FleetError
    return kind(found["message"])


def _rank_main(payload: dict[str, Any]) -> None:
    """What every rank runs; an error of ours is written down, so that restarts end at once and the driver gets it."""
    import torch.distributed as dist

    config: RunConfig = payload["config"]
    error_file = Path(payload["error_file"])
    if error_file.exists():
        return
    ranks = current_ranks(config.distributed.num_threads_per_rank)
    log_to_file(RunFolder(config.output_path).logs, f"{payload['stage']} rank {ranks.rank}")
    try:
        resolve(payload["entry"])(config, ranks, **payload["options"])
    except ProperError as error:
        get_logger().exception("%s failed", payload["stage"])
        write_json_atomic(error_file, {"message": str(error), "is_users": isinstance(error, UserError)})
        raise
    except Exception:
        get_logger().error("%s failed:\n%s", payload["stage"], traceback.format_exc())
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
