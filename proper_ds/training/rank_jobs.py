"""What the ranks of a gang run: the named stages, one after another in the same processes."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from proper_ds.distributed.ranks import Ranks
from proper_ds.observe.log import get_logger
from proper_ds.run_folder import split_lane
from proper_ds.training.context import RunContext
from proper_ds.training.group import GroupStage
from proper_ds.training.joint import JointStage
from proper_ds.training.plora import PloraStage
from proper_ds.training.population import PopulationStage
from proper_ds.training.pplug import PplugStage
from proper_ds.training.rank_stage import CHECKPOINT, RankStage, run_rank_stage
from proper_ds.training.router import RouterStage
from proper_ds.training.start import StartStage

if TYPE_CHECKING:
    from proper_ds.config import RunConfig


def make_stage(name: str, context: RunContext, ranks: Ranks) -> RankStage:
    """The stage of this full name, in its lane.

    It is `population`, `group/<preset>`, `router/<preset>`, `store/<preset>-joint`, `start/<set>`,
    `pplug/<base>` or `plora`.
    """
    own_name, lane = split_lane(name)
    context = replace(context, lane=lane)
    kind, _, preset = own_name.partition("/")
    if kind == "population":
        return PopulationStage(context)
    if kind == "pplug":
        return PplugStage(context, with_population=preset == "population")
    if kind == "plora":
        return PloraStage(context, ranks)
    if kind == "start":
        return StartStage(context, preset)
    if kind == "store":
        return JointStage(context, preset.removesuffix("-joint"), ranks)
    return GroupStage(context, preset, ranks) if kind == "group" else RouterStage(context, preset, ranks)


def run_stages(config: RunConfig, ranks: Ranks, stages: list[list]) -> None:
    """Run each [name, fingerprint, settings, made_from] and commit it; a collective.

    Those that this gang committed before it lost a rank are left out.
    """
    context = RunContext(config, ranks.device)
    for name, fingerprint, settings, made_from in stages:
        place = context.folder.stage(name)
        if ranks.gather([int(place.is_done(fingerprint))])[0][0]:
            continue
        start_s = time.perf_counter()
        train_batch_size = run_rank_stage(make_stage(name, context, ranks), ranks, fingerprint)
        get_logger().info("%s: done in %.1f s", name, time.perf_counter() - start_s)
        if ranks.is_first:
            about = made_from | {"train_batch_size": train_batch_size}
            place.commit(fingerprint, settings, time.perf_counter() - start_s, about)
            shutil.rmtree(place.path / CHECKPOINT, ignore_errors=True)  # after the commit: a kill between costs nothing
        ranks.barrier()
