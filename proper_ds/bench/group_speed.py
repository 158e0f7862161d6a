"""Speed of the group level on one process: fused experts, the released code's loop over them, and one ordinary LoRA.

All three train on the same random examples and the same random base, in turn; the loop one example at a time, as the
released code does, its gradients added up over the same batch. `proper-ds bench group` calls it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from proper_ds.bench.group_grid import ROWS_PER_RANK, cases, measure
from proper_ds.bench.group_grid import R as RANK_R
from proper_ds.bench.group_rivals import ExpertLoop
from proper_ds.bench.harness import Measured, in_turn, machine, tell, write_result
from proper_ds.bench.workloads import PRESETS, Preset, random_llama, random_users
from proper_ds.data.batches import collate
from proper_ds.data.tokens import Example
from proper_ds.errors import UserError
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.config import LoraSettings
from proper_ds.model.groups import GroupLevel, GroupSizes
from proper_ds.model.lora import LoraLayout
from proper_ds.model.presets import PRESETS as MODES
from proper_ds.observe.log import get_logger
from proper_ds.training.group_module import GroupModule
from proper_ds.training.population import PopulationModule
from proper_ds.training.rank_batch import RankBatch

NUM_ROWS, NUM_STEPS, R = 16, 4, 4
LEARNING_RATE = 1e-3
LOSS_TOLERANCE = 1e-4
"""Speeds of trainings whose mean losses differ by more mean nothing."""


class _Trainer:
    """One variant: its module with its own optimizer, fed whole batches or one example at a time."""

    def __init__(
        self, module: nn.Module, trained: list[nn.Parameter], batches: Sequence[Sequence[Example]], one_by_one: bool
    ) -> None:
        self._module, self._batches, self._one_by_one = module, batches, one_by_one
        self._trained = trained
        self._optimizer = torch.optim.AdamW(self._trained, lr=LEARNING_RATE)

    def __call__(self) -> list[float]:
        """Train on every batch once; the mean loss per target token of each."""
        found = []
        for examples in self._batches:
            parts = [[example] for example in examples] if self._one_by_one else [examples]
            num_targets = sum(example.num_targets for example in examples)
            ce = 0.0
            for part in parts:
                lines = torch.tensor([1 + example.user for example in part], device=self._trained[0].device)
                batch = RankBatch(collate(part, lines.device), 1.0, num_targets, len(examples))
                batch.line_R = lines
                loss, numbers = self._module(batch)
                loss.backward()
                ce += float(numbers["ce"])
            nn.utils.clip_grad_norm_(self._trained, 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad()
            found.append(ce / num_targets)
        return found


def _examples(preset: Preset) -> list[list[Example]]:
    users = random_users(preset, [NUM_STEPS] * NUM_ROWS)
    return [[user.examples[step] for user in users] for step in range(NUM_STEPS)]


def variants(preset: Preset, num_experts: int, device: torch.device) -> dict[str, Callable[[], list[float]]]:
    """`fused`, `loop` and `ceiling` by name."""
    base = random_llama(preset, torch.float32, device)
    settings, batches = LoraSettings(r=R), _examples(preset)

    def model() -> PersonalModel:
        lm = copy.deepcopy(base)
        return PersonalModel(lm, find_targets(lm, settings.target_modules))

    layout = LoraLayout.of(find_targets(base, settings.target_modules), settings)
    found: dict[str, Callable[[], list[float]]] = {}
    for name in ("fused", "loop"):
        sizes = GroupSizes(num_experts, num_users=NUM_ROWS)
        level = GroupLevel(layout, MODES["proper-released"], sizes, 0).to(device)
        module = GroupModule(model(), level, 0.0, 0.0, 0.0)
        trained = list(level.parameters())
        if name == "loop":
            loops = {key: ExpertLoop(mixture) for key, mixture in level.by_module().items()}
            module.model.attach_groups(loops)  # type: ignore[arg-type]
            fused = set(level.experts.parameters())
            trained = [p for p in trained if p not in fused]
            trained += [p for loop in loops.values() for p in loop.experts_parameters()]
        found[name] = _Trainer(module, trained, batches, one_by_one=name == "loop")
    wide = PopulationModule(model(), layout.with_rank(R * num_experts), 0.0, seed=0).to(device)
    found["ceiling"] = _Trainer(wide, list(wide.loras.parameters()), batches, one_by_one=False)
    return found


def compare(preset_name: str, num_experts: int, num_repeats: int) -> dict[str, Any]:
    """Tokens a second of each variant, their ratios in the same repetition, and how far the losses are apart.

    Raises:
        UserError: where fused experts and loop do not train the same.
    """
    preset = PRESETS[preset_name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    calls = variants(preset, num_experts, device)
    num_tokens = sum(len(example.ids) for examples in _examples(preset) for example in examples)
    losses: dict[str, list[float]] = {name: [] for name in calls}

    def on_done(name: str, number: int, seconds: float, result: list[float]) -> None:
        losses[name] += result
        rate = num_tokens / seconds
        get_logger().info("%d experts, %d of %d, %s: %.0f tokens/s", num_experts, number + 1, num_repeats, name, rate)

    seconds = in_turn(calls, num_repeats, on_done)
    rates = {name: took.per(num_tokens) for name, took in seconds.items()}
    difference = max(abs(a - b) for a, b in zip(losses["fused"], losses["loop"], strict=True))
    if not difference <= LOSS_TOLERANCE:
        raise UserError(f"fused experts and the loop do not train the same: their losses differ by {difference:.1e}")
    return {
        "num_experts": num_experts,
        "tokens_per_s": {name: rate.median for name, rate in rates.items()},
        "spread": {name: rate.spread for name, rate in rates.items()},
        "times_loop": _ratio(rates["fused"], rates["loop"]),
        "of_ceiling": _ratio(rates["fused"], rates["ceiling"]),
        "max_loss_difference_to_loop": difference,
        "loss": {name: [own[0], own[-1]] for name, own in losses.items()},
    }


def _ratio(mine: Measured, other: Measured) -> float:
    return Measured(tuple(a / b for a, b in zip(mine.values, other.values, strict=True))).median


def bench_group(
    preset_name: str,
    num_experts: Sequence[int],
    most_experts: int,
    num_repeats: int,
    num_ranks: Sequence[int],
    json_path: Path | None,
) -> dict[str, Any]:
    """Compare with the rivals, then measure on ranks; print both tables and return what `--json` writes.

    Args:
        num_experts: of the comparison with the rivals.
        most_experts: that ranks have.
        num_ranks: gangs to measure on; none leaves that part out.
    """
    if preset_name not in PRESETS:
        raise UserError(f"--preset {preset_name!r} is unknown; legal are {', '.join(PRESETS)}")
    result: dict[str, Any] = {"preset": preset_name, "r": R, "rows": NUM_ROWS, "machine": machine()}
    result["speed"] = [compare(preset_name, num, num_repeats) for num in num_experts]
    _tell_speed(result, num_repeats)
    result["ranks"] = measure(cases(num_ranks, most_experts))
    if result["ranks"]:
        _tell_ranks(result)
    write_result(json_path, result)
    return result


def _tell_speed(result: dict[str, Any], num_repeats: int) -> None:
    rows = [
        [
            str(one["num_experts"]),
            *(f"{one['tokens_per_s'][name]:,.0f} ({one['spread'][name]:.0%})" for name in ("fused", "loop", "ceiling")),
            f"{one['times_loop']:.2f}",
            f"{one['of_ceiling']:.2f}",
            f"{one['max_loss_difference_to_loop']:.0e}",
        ]
        for one in result["speed"]
    ]
    columns = ["experts", "fused tokens/s (spread)", "loop", "ceiling", "x loop", "of ceiling", "losses differ by"]
    notes = [
        f"{NUM_ROWS} rows a step, rank {R} an expert on the feed-forward layers, fp32; medians of {num_repeats}",
        "loop: the released code's, one example at a time; ceiling: one LoRA of all experts' ranks together",
    ]
    tell(f"bench group, {result['preset']}, proper-released, dense routing, one process", columns, rows, notes, result)


def _tell_ranks(result: dict[str, Any]) -> None:
    names = ("num_ranks", "zero", "num_experts", "expert_parallel_size")
    rows = [
        [
            *(str(one[name]) for name in names),
            one["routing"],
            f"{one['tokens_per_s']:,.0f}",
            f"{one['spread']:.0%}",
            f"{one['peak_bytes'] / 1e6:,.0f}",
        ]
        for one in result["ranks"]
    ]
    columns = ["ranks", "ZeRO", "experts", "expert parallel", "routing", "tokens/s", "spread", "peak MB a rank"]
    notes = [
        f"{ROWS_PER_RANK} rows a rank, experts of rank {RANK_R} on the feed-forward layers of a small base, fp32",
        "blocks: as many as ranks that share experts, each example with its experts' rank, so no token crosses ranks",
        "tokens/s of all ranks together, who share this machine; memory above that before the model was made",
    ]
    tell("bench group, preset proper on ranks", columns, rows, notes, result)
