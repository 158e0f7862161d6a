"""Tokens a second and peak memory of the group stage on ranks: ZeRO stage, expert parallelism, experts, routing.

`proper-ds bench group` runs it beside `group_speed.py`; `parity.py` shows that all of these train the same.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from proper_ds.bench.harness import Measured
from proper_ds.bench.rank_memory import PeakMemory
from proper_ds.bench.workloads import Preset, random_llama
from proper_ds.data.batches import collate
from proper_ds.data.tokens import HISTORY, Example
from proper_ds.distributed.ds_config import resolve_ds
from proper_ds.distributed.engine import RankEngine
from proper_ds.distributed.expert_parallel import ExpertGroups, TokenExchange
from proper_ds.distributed.local_ranks import run_local_ranks
from proper_ds.distributed.ranks import Ranks, current_ranks
from proper_ds.distributed.recent_shares import RecentShares
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.config import LoraSettings
from proper_ds.model.groups import GroupLevel, GroupSizes
from proper_ds.model.lora import LoraLayout
from proper_ds.model.presets import preset_of
from proper_ds.observe.log import get_logger
from proper_ds.training.config import GroupConfig
from proper_ds.training.group import group_apart
from proper_ds.training.group_module import GroupModule
from proper_ds.training.rank_batch import RankBatch

WORKLOAD = Preset(128, 344, 2, 4, 4, 1024, 0, 0, 16, 48, 0)
ROWS_PER_RANK, NUM_FEATURES, R = 8, 16, 8
NUM_WARM, NUM_STEPS = 2, 5
TIMEOUT_S = 1200.0


@dataclass(frozen=True)
class Case:
    """One setting; `routing` is `dense`, `top-2`, or `blocks`, which places examples with their experts."""

    num_ranks: int
    zero: int
    expert_parallel_size: int
    num_experts: int
    routing: str

    def __str__(self) -> str:
        """For the log."""
        size = self.expert_parallel_size
        return f"{self.num_ranks} ranks, ZeRO {self.zero}, {self.num_experts} experts, ep {size}, {self.routing}"


def cases(num_ranks: Sequence[int], most_experts: int, most_dense: int = 512) -> list[Case]:
    """ZeRO stages at 8 experts, then numbers of experts under ZeRO 2; both at every expert-parallel size.

    Blocks stand beside dense routing where tokens would else cross ranks.
    """
    found = []
    for ranks in num_ranks:
        sizes = [size for size in (1, 2, 4) if ranks % size == 0]
        found += [Case(ranks, zero, s, 8, way) for zero in (0, 1, 2, 3) for s in sizes for way in ("dense", "top-2")]
        for num in (number for number in (5, 64, 512, 4096) if number <= most_experts):
            for size in (size for size in sizes if num % size == 0):
                routings = ["dense"] if num <= most_dense else []
                routings += ["top-2"] + (["blocks"] if size > 1 else [])
                found += [Case(ranks, 2, size, num, routing) for routing in routings]
    return found


def on_ranks(payload: dict[str, Any]) -> dict[str, Any]:
    """What each rank runs: the case in `payload`, after the same with a handful of experts."""
    case = Case(**payload)
    _run(replace(case, num_experts=4 * case.expert_parallel_size))
    return _run(case)


def _run(case: Case) -> dict[str, Any]:
    """Seconds of each step, this rank's tokens a step, and its peak bytes above what it held before."""
    ranks, memory = current_ranks(1), PeakMemory()
    gc.collect()
    before = memory.now()
    memory.begin()
    engine = _engine(case)
    batches = [_batch(step, ranks, case) for step in range(NUM_WARM + NUM_STEPS)]
    seconds, ce = [], 0.0
    for number, batch in enumerate(batches):
        ranks.barrier()
        start_s = time.perf_counter()
        ce = engine.step([batch], 1e-3)["ce"]
        ranks.barrier()
        if number >= NUM_WARM:
            seconds.append(time.perf_counter() - start_s)
    engine.close()
    assert np.isfinite(ce)
    lengths = [sum(len(e.ids) for e in batch.examples) for batch in batches[NUM_WARM:]]
    return {"seconds": seconds, "tokens": float(np.mean(lengths)), "peak_bytes": memory.take() - before}


def _engine(case: Case) -> RankEngine:
    ranks = current_ranks(1)
    settings = GroupConfig(num_experts=case.num_experts, per_device_train_batch_size=ROWS_PER_RANK)
    zero = {"stage": case.zero} | ({"stage3_param_persistence_threshold": 0} if case.zero == 3 else {})
    ds_config, problems = resolve_ds({"zero_optimization": zero}, "group", settings, ranks.num_ranks, bf16=False)
    assert not problems, problems
    groups = ExpertGroups.make(ranks, case.expert_parallel_size)
    lm = random_llama(WORKLOAD, torch.float32, ranks.device)
    lora = LoraSettings(r=R)
    targets = find_targets(lm, lora.target_modules)
    sizes = GroupSizes(
        case.num_experts,
        top_k=2 if case.routing == "top-2" else None,
        num_blocks=groups.size if case.routing == "blocks" else None,
        feature_size=NUM_FEATURES,
        user_vector_size=settings.user_vector_size,
    )
    held = groups.share(case.num_experts)
    level = GroupLevel(LoraLayout.of(targets, lora), preset_of("proper", "encoder"), sizes, 0, held=held)
    level.to(ranks.device)
    shares = RecentShares(len(level.layout.modules), case.num_experts, ranks)
    apart, table = group_apart(level, groups, ds_config, seed=0)
    exchange = TokenExchange(groups) if groups.size > 1 and case.routing != "blocks" else None
    model = PersonalModel(lm, targets)
    module = GroupModule(model, level, 0.0, 0.01, 0.01, table=table, exchange=exchange, shares=shares)
    return RankEngine(module.to(ranks.device), ds_config, ranks, [shares, *apart])


def _batch(step: int, ranks: Ranks, case: Case) -> RankBatch:
    generator, device = np.random.default_rng([step, ranks.rank]), ranks.device
    examples = []
    for row in range(ROWS_PER_RANK):
        length = int(generator.integers(WORKLOAD.shortest, WORKLOAD.longest + 1))
        ids = generator.integers(3, WORKLOAD.vocab_size, length).astype(np.int64)
        examples.append(Example(row, HISTORY, 0, row, length - 4, ids))
    num_rows = ROWS_PER_RANK * ranks.num_ranks
    made = RankBatch(collate(examples, device), 1.0, 4 * num_rows, num_rows)
    features = generator.normal(size=(ROWS_PER_RANK, NUM_FEATURES))
    made.features_RF = torch.tensor(features, dtype=torch.float32, device=device)
    made.known_R = torch.ones(ROWS_PER_RANK, dtype=torch.bool, device=device)
    if case.routing == "blocks":  # as many blocks as ranks in a group: all users of a rank have its own
        made.block_R = torch.full((ROWS_PER_RANK,), ranks.rank % case.expert_parallel_size, device=device)
    return made


def measure(wanted: Sequence[Case]) -> list[dict[str, Any]]:
    """Each case with tokens a second of all ranks together, and the peak bytes of the rank that has most."""
    found = []
    for case in wanted:  # in new processes: memory that an earlier case freed would hide what this one takes
        ranks = run_local_ranks("proper_ds.bench.group_grid:on_ranks", case.num_ranks, asdict(case), TIMEOUT_S)
        slowest = tuple(max(each) for each in zip(*(rank["seconds"] for rank in ranks), strict=True))
        rate = Measured(slowest).per(sum(rank["tokens"] for rank in ranks))
        peak = max(rank["peak_bytes"] for rank in ranks)
        found.append(asdict(case) | {"tokens_per_s": rate.median, "spread": rate.spread, "peak_bytes": peak})
        get_logger().info("%s: %.0f tokens/s, %.0f MB", case, rate.median, peak / 1e6)
    return found
