"""The optimizer steps of a test on the running ranks, from its checkpoint on where there is one to go on from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from proper_ds.distributed.apart import Apart
from proper_ds.distributed.checkpoint import Checkpoints
from proper_ds.distributed.engine import RankEngine
from proper_ds.distributed.ranks import Ranks
from proper_ds.training.rank_stage import load_trained


def train_steps(
    module: nn.Module,
    ds_config: dict[str, Any],
    ranks: Ranks,
    folder: Path,
    steps: range,
    batches_of: Callable[[int], list[Any]],
    rate: float,
    apart: Sequence[Apart] = (),
) -> tuple[list[float], dict[str, Tensor]]:
    """(losses summed over ranks by step, all weights after the last); a start at 0 knows no checkpoint."""
    checkpoints = Checkpoints(folder, "inputs", 1)
    checkpoint = checkpoints.latest(ranks) if steps.start else None
    if checkpoint is not None:
        load_trained(module, checkpoint.tensors)
    engine, losses = RankEngine(module, ds_config, ranks, list(apart)), []
    for step in steps:
        batches = batches_of(step)
        if step == steps.start and checkpoint is not None:
            engine.restore(checkpoint, batches[0])
        losses.append(ranks.sum([engine.step(batches, rate)["ce"]])[0])
    checkpoints.save(steps.stop, engine.state(), engine.shards(), {}, ranks)
    engine.close()
    found = checkpoints.latest(ranks)
    assert found is not None
    return losses, found.weights()
