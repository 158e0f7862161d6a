"""Ranks through Ray Train: starts them together, restarts them together when one is lost, hands their errors back."""

from __future__ import annotations

import json
import shutil
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as TrainRunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from proper_ds.distributed.ranks import current_ranks
from proper_ds.errors import FleetError, ProperError, UserError
from proper_ds.files import write_json_atomic
from proper_ds.fleet.cluster import Cluster
from proper_ds.fleet.worker import resolve
from proper_ds.observe.log import get_logger, log_to_file
from proper_ds.run_folder import RunFolder

if TYPE_CHECKING:
    from proper_ds.config import RunConfig


def run_gang(entry: str, config: RunConfig, options: dict[str, Any], stage: str, cluster: Cluster) -> None:
    """Run `entry(config, ranks, **options)` on `distributed.num_ranks` ranks and wait for the end.

    Raises:
        UserError: what the entry raised because of its input: tried once.
        FleetError: when ranks failed more often than `distributed.max_restarts`.
    """
    distributed = config.distributed
    cluster.now().check_ranks(distributed.num_ranks, distributed.num_cpus_per_rank)
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
        scaling_config=ScalingConfig(
            num_workers=distributed.num_ranks,
            use_gpu=cluster.on_gpu,
            resources_per_worker={"CPU": distributed.num_cpus_per_rank} | ({"GPU": 1} if cluster.on_gpu else {}),
        ),
        torch_config=TorchConfig(backend="nccl" if cluster.on_gpu else "gloo"),
        run_config=TrainRunConfig(
            name=name,
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=distributed.max_restarts),
        ),
    )
    try:
        trainer.fit()
        if error_file.exists():
            raise _as_ours(None, error_file, stage)
    except ProperError:
        raise
    except Exception as error:
        raise _as_ours(error, error_file, stage) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class _Trainer(TorchTrainer):
    """Leaves Ctrl-C to Python: `fit` raises KeyboardInterrupt, and what the driver holds open ends with it.

    Ray Train's own handler waits for the ranks (seen to hang), ends the process with code 0, and stays in place for
    everything that runs later.
    """

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


def _as_ours(error: Exception | None, error_file: Path, stage: str) -> ProperError:
    if error_file.exists():
        found = json.loads(error_file.read_text(encoding="utf-8"))
        kind = UserError if found["is_users"] else FleetError
        return kind(found["message"])
    return FleetError(f"{stage}: ranks failed ({error}); the logs are in the run's folder. Run again to go on.")


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
