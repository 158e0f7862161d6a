"""`proper-ds bench group --parity`: the group stage's losses on several ranks beside one plain process.

The plain process has everything on it: torch's AdamW and clipping, no DeepSpeed, no exchange. Every other run must
have its losses, whatever the number of ranks, ZeRO stage, expert-parallel size and routing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from proper_ds.bench.harness import machine, tell, write_result
from proper_ds.bench.workloads import Preset as Workload
from proper_ds.bench.workloads import random_llama
from proper_ds.data.batches import collate
from proper_ds.data.tokens import HISTORY, Example
from proper_ds.distributed.checkpoint import Shard
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
from proper_ds.model.user_vectors import initial_lines
from proper_ds.training.config import GroupConfig
from proper_ds.training.group import group_apart
from proper_ds.training.group_module import GroupModule
from proper_ds.training.rank_batch import RankBatch

Tensor = torch.Tensor

NUM_STEPS, NUM_EXPERTS, NUM_USERS, NUM_BLOCKS = 20, 8, 12, 4
GLOBAL_ROWS, NUM_FEATURES = 8, 12
SEED = 5
SETTINGS = GroupConfig(
    learning_rate=5e-3, weight_decay=0.01, max_grad_norm=0.3, num_experts=NUM_EXPERTS, user_vector_size=8
)
WORKLOAD = Workload(48, 96, 2, 4, 4, 128, 0, 0, 8, 24, 0)
TARGETS = ["gate_proj", "up_proj", "down_proj"]
TIMEOUT_S = 900.0
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """One run: `zero` 3 has no persistent parameters (`stage3_param_persistence_threshold: 0`)."""

    num_ranks: int
    zero: int
    expert_parallel_size: int
    routing: str

    @property
    def sizes(self) -> GroupSizes:
        """Of its group level."""
        return GroupSizes(
            NUM_EXPERTS,
            top_k=2 if self.routing == "top-2" else None,
            num_blocks=NUM_BLOCKS if self.routing == "blocks" else None,
            feature_size=NUM_FEATURES,
            user_vector_size=0 if self.routing == "released" else SETTINGS.user_vector_size,
            num_users=NUM_USERS,
        )

    @property
    def exchanges(self) -> bool:
        """Whether tokens cross ranks."""
        return self.expert_parallel_size > 1 and self.routing != "blocks"


ROUTINGS = {
    "dense": ("proper", "encoder"),
    "top-2": ("proper", "encoder"),
    "blocks": ("proper", "encoder"),
    "table": ("proper", "table"),
    "released": ("proper-released", "table"),
}
"""By name: preset and user vector."""


def cases(num_ranks: int) -> list[Case]:
    """All ZeRO stages and expert-parallel sizes of so many ranks; table and released routing under stages 2 and 3."""
    return [
        Case(num_ranks, zero, size, routing)
        for routing in ROUTINGS
        for zero in ((0, 1, 2, 3) if routing in ("dense", "top-2") else (2, 3))
        for size in (1, 2, 4)
        if num_ranks % size == 0
    ]


def _level(case: Case, held: range | None, with_table: bool) -> tuple[GroupLevel, PersonalModel]:
    lm = random_llama(WORKLOAD, torch.float32, torch.device("cpu"))
    for parameter in lm.parameters():  # random_llama's own weights hardly tell tokens apart
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15, generator=torch.Generator().manual_seed(parameter.numel()))
    targets = find_targets(lm, TARGETS)
    layout = LoraLayout.of(targets, LoraSettings(r=4, lora_alpha=8, target_modules=TARGETS))
    preset = preset_of(*ROUTINGS[case.routing])  # type: ignore[arg-type]
    level = GroupLevel(layout, preset, case.sizes, SEED, held=held, with_table=with_table)
    if level.encoder is not None:
        level.encoder.centroids.copy_(_features(range(NUM_BLOCKS))[: len(level.encoder.centroids)])
    return level, PersonalModel(lm, targets)


def _features(users: Any) -> Tensor:
    rows = [np.random.default_rng([7, int(user)]).normal(size=NUM_FEATURES) for user in users]
    return torch.tensor(np.stack(rows), dtype=torch.float32)


def _examples(step: int) -> list[Example]:
    """The global batch of a step; every fifth is short, so that some rank has nothing."""
    generator = np.random.default_rng([3, step])
    found = []
    for row in range(GLOBAL_ROWS if step % 5 else 3):
        length = int(generator.integers(WORKLOAD.shortest, WORKLOAD.longest + 1))
        ids = generator.integers(3, WORKLOAD.vocab_size, length).astype(np.int64)
        user = int(generator.integers(NUM_USERS))
        ids[-3:] = 3 + user % 3 * 3 + np.arange(3)  # what can be learned: users of one kind answer alike
        found.append(Example(user, HISTORY, 0, row, length - 3, ids))
    return found


def _batch(examples: list[Example], everything: list[Example], level: GroupLevel) -> RankBatch:
    """A rank's part of the global batch; a row of weight 0 where it has none."""
    num_targets = sum(example.num_targets for example in everything)
    mine = examples or [Example(0, HISTORY, 0, 0, 3, np.arange(3, 7))]  # somebody who is not in the batch
    made = RankBatch(collate(mine), 1.0 if examples else 0.0, num_targets, len(everything))
    users = [example.user for example in mine]
    made.features_RF, made.known_R = _features(users), torch.tensor([user % 5 > 0 for user in users])
    made.line_R = torch.tensor([user % 5 and user + 1 for user in users])
    if level.encoder is not None and len(level.encoder.centroids):
        made.block_R = level.encoder.blocks(made.features_RF)
    return made


def _share(case: Case, examples: list[Example], rank: int, level: GroupLevel) -> list[Example]:
    """The examples of a rank: by the owner of the user's block, or one after another."""
    if case.routing == "blocks" and case.expert_parallel_size > 1:
        size = case.expert_parallel_size
        assert level.encoder is not None
        owner = level.encoder.blocks(_features([example.user for example in examples])) * size // NUM_BLOCKS
        theirs = [example for example, place in zip(examples, owner.tolist(), strict=True) if place == rank % size]
        return theirs[rank // size :: case.num_ranks // size]
    return examples[rank :: case.num_ranks]


def train_plain(routing: str, num_parts: int = 1) -> tuple[list[float], dict[str, Tensor]]:
    """Everything in one process: loss of each step, and the experts' first moments after the first step.

    `num_parts` micro-batches instead of one show what another order of summation alone does to the losses: AdamW
    divides gradients that are next to nothing by their own size, and so makes rounding larger from step to step.
    """
    case = Case(1, 0, 1, routing)
    level, model = _level(case, None, with_table=True)
    if level.user_table is not None:
        lines = initial_lines(0, 1 + NUM_USERS, level.table_width, SEED)
        level.user_table.weight.data.copy_(lines)
    shares = RecentShares(len(level.layout.modules), NUM_EXPERTS, Ranks(0, 1, torch.device("cpu")))
    module = GroupModule(model, level, 0.0, 0.1, 0.1, shares=shares)
    table = None if level.user_table is None else level.user_table.weight
    trained = [p for p in level.parameters() if p is not table]
    optimizers = [torch.optim.AdamW(trained, lr=SETTINGS.learning_rate, weight_decay=SETTINGS.weight_decay)]
    lazy = _LazyRows(table) if table is not None else None
    losses, moments = [], dict[str, Tensor]()
    for step in range(NUM_STEPS):
        everything = _examples(step)
        ce = 0.0
        for part in range(num_parts):
            loss, numbers = module(_batch(everything[part::num_parts], everything, level))
            loss.backward()
            ce += float(numbers["ce"])
        shares.reduce()
        torch.nn.utils.clip_grad_norm_([*trained, *([table] if table is not None else [])], SETTINGS.max_grad_norm)
        optimizers[0].step()
        if lazy is not None:
            lazy.step(_batch(everything, everything, level).line_R)
        level.zero_grad()
        losses.append(ce / sum(e.num_targets for e in everything))
        if not step:
            state = optimizers[0].state
            moments = {n: state[p]["exp_avg"].clone() for n, p in level.named_parameters() if n.startswith("experts.")}
    return losses, moments


class _LazyRows:
    """AdamW by lines: torch's, one parameter a line, stepped where the line was in the batch."""

    def __init__(self, table: torch.nn.Parameter) -> None:
        self._table = table
        self._lines = [torch.nn.Parameter(line.detach().clone()) for line in table]
        self._adams = [
            torch.optim.AdamW([line], lr=SETTINGS.learning_rate, weight_decay=SETTINGS.weight_decay)
            for line in self._lines
        ]

    def step(self, line_R: Tensor | None) -> None:
        assert line_R is not None and self._table.grad is not None
        for number in set(line_R.tolist()):
            self._lines[number].grad = self._table.grad[number].clone()
            self._adams[number].step()
            self._table.data[number] = self._lines[number].detach()


def train_on_ranks(case: Case, num_steps: int = NUM_STEPS) -> tuple[list[float], list[Shard]]:
    """One case on the running ranks: loss of each step, and this rank's shards after the first step."""
    ranks = current_ranks(1)
    zero = {"stage": case.zero} | ({"stage3_param_persistence_threshold": 0} if case.zero == 3 else {})
    settings = SETTINGS.model_copy(update={"per_device_train_batch_size": -(-GLOBAL_ROWS // ranks.num_ranks)})
    ds_config, problems = resolve_ds({"zero_optimization": zero}, "group", settings, ranks.num_ranks, bf16=False)
    assert not problems, problems
    groups = ExpertGroups.make(ranks, case.expert_parallel_size)
    level, model = _level(case, groups.share(NUM_EXPERTS), with_table=False)
    shares = RecentShares(len(level.layout.modules), NUM_EXPERTS, ranks)
    apart, table = group_apart(level, groups, ds_config, SEED)
    exchange = TokenExchange(groups) if case.exchanges else None
    module = GroupModule(model, level, 0.0, 0.1, 0.1, table=table, exchange=exchange, shares=shares)
    engine = RankEngine(module, ds_config, ranks, [shares, *apart])
    losses, shards = [], list[Shard]()
    for step in range(num_steps):
        everything = _examples(step)
        batch = _batch(_share(case, everything, ranks.rank, level), everything, level)
        numbers = engine.step([batch], SETTINGS.learning_rate)
        losses.append(ranks.sum([numbers["ce"]])[0] / sum(e.num_targets for e in everything))
        if not step:
            shards = engine.shards()
    engine.close()
    return losses, shards


def on_ranks(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank runs: the cases one after another; against the plain process' losses and moments."""
    found = []
    plain = {routing: train_plain(routing) for routing in {case["routing"] for case in payload["cases"]}}
    for case in (Case(**values) for values in payload["cases"]):
        losses, shards = train_on_ranks(case)
        wanted, moments = plain[case.routing]
        found.append(
            {
                "num_ranks": case.num_ranks,
                "zero_stage": case.zero,
                "expert_parallel_size": case.expert_parallel_size,
                "routing": case.routing,
                "losses": losses,
                "loss_difference": max(abs(a - b) for a, b in zip(losses, wanted, strict=True)),
                "gradient_difference": _moments_apart(shards, moments),
            }
        )
    return found


def _moments_apart(shards: list[Shard], moments: dict[str, Tensor]) -> float:
    """Largest difference of a (clipped) expert gradient of the first step, of those that this rank writes."""
    worst = 0.0
    for shard in shards:
        kind, _, name = shard.name.partition("/")
        if kind == "exp_avg" and name.startswith("experts."):
            wanted = moments[name][shard.start : shard.start + len(shard.tensor)]
            worst = max(worst, float((shard.tensor - wanted).abs().max()) / (1 - SETTINGS.adam_beta1))
    return worst


def bench_parity(json_file: Path | None, ranks: tuple[int, ...] = (1, 2, 4)) -> dict[str, Any]:
    """Run all cases, print the table, write the JSON with `max_loss_difference`."""
    rows: list[dict[str, Any]] = []
    for num_ranks in ranks:
        payload = {"cases": [asdict(case) for case in cases(num_ranks)]}
        by_rank = run_local_ranks("proper_ds.bench.parity:on_ranks", num_ranks, payload, TIMEOUT_S)
        for of_case in zip(*by_rank, strict=True):
            worst = max(one["gradient_difference"] for one in of_case)
            rows.append(of_case[0] | {"gradient_difference": worst})
    wanted = {routing: train_plain(routing)[0] for routing in ROUTINGS}
    parts = {routing: train_plain(routing, 4)[0] for routing in ROUTINGS}
    rounding = max(abs(a - b) for routing in ROUTINGS for a, b in zip(parts[routing], wanted[routing], strict=True))
    result = {
        "max_loss_difference": max(row["loss_difference"] for row in rows),
        "max_gradient_difference": max(row["gradient_difference"] for row in rows),
        "tolerance": TOLERANCE,
        "plain_in_four_parts_difference": rounding,
        "num_steps": NUM_STEPS,
        "plain": wanted,
        "cases": rows,
        "machine": machine(),
    }
    tell(
        f"Losses over {NUM_STEPS} steps beside one plain process (fp32, {NUM_EXPERTS} experts)",
        ["routing", "ranks", "ZeRO", "expert parallel", "first loss", "last loss", "loss difference", "gradients"],
        [_line(row) for row in rows],
        [
            f"largest difference of a loss {result['max_loss_difference']:.1e} (wanted {TOLERANCE:.0e}), of an expert's"
            f" gradient in the first step {result['max_gradient_difference']:.1e}",
            f"the plain process itself, with its batches cut in four: {rounding:.1e}",
            "ZeRO 3 with stage3_param_persistence_threshold 0; blocks: examples placed with their experts, no exchange",
        ],
        result,
    )
    write_result(json_file, result)
    return result


def _line(row: dict[str, Any]) -> list[str]:
    return [
        row["routing"],
        str(row["num_ranks"]),
        str(row["zero_stage"]),
        str(row["expert_parallel_size"]),
        f"{row['losses'][0]:.5f}",
        f"{row['losses'][-1]:.5f}",
        f"{row['loss_difference']:.1e}",
        f"{row['gradient_difference']:.1e}",
    ]
