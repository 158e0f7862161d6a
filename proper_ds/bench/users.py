"""`proper-ds bench users`: our engine beside a PEFT loop, `transformers.Trainer` per user, and one shared LoRA.

All variants train the same random users on the same random model; the losses of every user and step must agree.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from proper_ds.bench import rivals
from proper_ds.bench.harness import Measured, in_turn, machine, tell, write_result
from proper_ds.bench.workloads import PRESETS, Preset, random_llama, random_users, user_settings
from proper_ds.errors import UserError
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets, linears_of
from proper_ds.model.lora import LoraLayout
from proper_ds.observe.log import get_logger, quiet_libraries
from proper_ds.training.config import UserConfig
from proper_ds.training.slots import UserTask
from proper_ds.training.users import Counters, train_users

SEED = 7
LOSS_TOLERANCE, BF16_TOLERANCE = 1e-4, 0.1
"""Speeds of trainings that differ by more mean nothing: for variants of one type, and with a bf16 base beside fp32."""
PARETO_USERS, PARETO_SHAPE, PARETO_MOST = 2000, 0.9, 1000
Losses = list[list[float]]


class _Bench:
    """One preset's models and users, and its variants as calls."""

    def __init__(self, preset: Preset, batch_size: int, scratch: Path) -> None:
        self.preset, self.scratch = preset, scratch
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.settings = user_settings(preset, batch_size)
        self.tasks = random_users(preset, [preset.num_items] * preset.num_users)
        self.counters: dict[str, Counters] = {}
        plain = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.lm = random_llama(preset, plain, self.device)
        self.layout = LoraLayout.of(find_targets(self.lm, self.settings.lora.target_modules), self.settings.lora)
        self.models = {plain: self._wrapped(plain)}
        if plain is not torch.bfloat16:
            self.models[torch.bfloat16] = self._wrapped(torch.bfloat16)
        self.plain = self.models[plain]

    def _wrapped(self, dtype: torch.dtype) -> PersonalModel:
        lm = copy.deepcopy(self.lm).to(dtype)
        return PersonalModel(lm, find_targets(lm, self.settings.lora.target_modules))

    def variants(self) -> dict[str, tuple[int, Callable[[], Losses | None]]]:
        """By name: users trained, and the call."""
        every, few = len(self.tasks), self.tasks[: self.preset.num_rival_users]
        apart = self.settings.model_copy(update={"share_prefix": False})
        found: dict[str, tuple[int, Callable[[], Losses | None]]] = {}
        if self.plain.lm.dtype == torch.float32:
            found["ours"] = (every, partial(self._ours, "ours", self.plain, apart))
            found["ours_prefix"] = (every, partial(self._ours, "ours_prefix", self.plain, self.settings))
        halved = self.models[torch.bfloat16]
        found["ours_prefix_bf16"] = (every, partial(self._ours, "ours_prefix_bf16", halved, self.settings))
        common = (self.lm, self.layout, few, self.settings, SEED)
        found["plain_loop"] = (len(few), partial(rivals.plain_loop, *common))
        found["trainer"] = (len(few), partial(rivals.trainer, *common, self.scratch))
        found["trainer_oppu"] = (len(few), partial(rivals.trainer, *common, self.scratch, as_oppu=True))
        shared = (self.plain, self.layout, self.tasks, self.settings, SEED)
        found["ceiling"] = (every, partial(rivals.ceiling, *shared))
        return found

    def _ours(self, name: str, model: PersonalModel, settings: UserConfig) -> Losses:
        self.counters[name] = Counters()
        results = train_users(model, self.layout, self.tasks, settings, SEED, self.counters[name])
        bad = [result for result in results if result.row_P is None]
        assert not bad, f"{len(bad)} users failed, the first because: {bad[0].reason}"
        return [result.losses for result in results]

    def pareto(self, num_users: int = PARETO_USERS) -> tuple[Counters, Sequence[UserTask]]:
        """One pass over users with heavy-tailed histories of 1 to 1,000 items, in 64 slots."""
        generator = np.random.default_rng(SEED)
        num_items = np.minimum(PARETO_MOST, 1 + generator.pareto(PARETO_SHAPE, num_users)).astype(int)
        num_items[0] = PARETO_MOST
        tasks, counters = random_users(self.preset, num_items.tolist()), Counters()
        settings = self.settings.model_copy(update={"num_slots": 64, "num_train_epochs": 1})
        train_users(self.plain, self.layout, tasks, settings, SEED, counters)
        return counters, tasks

    def needed_flops(self, name: str) -> float:
        """Floating-point operations that a variant of ours cannot do without: 4 a parameter and token, no padding."""
        preset, counters = self.preset, self.counters[name]
        num_linear = sum(m.weight.numel() for m in linears_of(self.lm).values())
        num_targets = preset.num_epochs * sum(e.num_targets for task in self.tasks for e in task.examples)
        return 4.0 * (num_linear * counters.whole.num_tokens + preset.vocab_size * preset.hidden_size * num_targets)


def matrix_rate(preset: Preset, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the hardware's own matrix product in the shape of the model's feed-forward layer; best of five."""
    num_tokens = preset.num_tokens_per_batch
    x = torch.randn(num_tokens, preset.hidden_size, device=device).to(dtype)
    y = torch.randn(preset.hidden_size, preset.intermediate_size, device=device).to(dtype)
    flops = 2.0 * num_tokens * preset.hidden_size * preset.intermediate_size
    num_calls = min(2000, max(3, int((1e13 if device.type == "cuda" else 5e10) / flops)))

    def run() -> None:
        for _ in range(num_calls):
            torch.mm(x, y)
        if device.type == "cuda":
            torch.cuda.synchronize()

    run()
    return num_calls * flops / min(in_turn({"mm": run}, 5)["mm"].values)


def bench_users(preset_name: str, batch_size: int, num_repeats: int, json_path: Path | None) -> dict[str, Any]:
    """Run the benchmark, print its table and return what `--json` writes. Raises UserError for an unknown preset."""
    if preset_name not in PRESETS:
        raise UserError(f"--preset {preset_name!r} is unknown; legal are {', '.join(PRESETS)}")
    if preset_name == "1b" and not torch.cuda.is_available():
        raise UserError("--preset 1b needs a GPU, and there is none here; use small, medium or large")
    quiet_libraries(on_gpu=torch.cuda.is_available())
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of what PEFT itself calls
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(PRESETS[preset_name], batch_size, Path(folder))
        variants = bench.variants()
        losses: dict[str, list[Losses]] = {}

        def on_done(name: str, number: int, seconds: float, result: Losses | None) -> None:
            if result is not None:
                losses.setdefault(name, []).append(result)
            rate = variants[name][0] / seconds
            get_logger().info("repetition %d of %d, %s: %.3g users/s", number + 1, num_repeats, name, rate)

        seconds = in_turn({name: call for name, (_, call) in variants.items()}, num_repeats, on_done)
        rates = {name: seconds[name].per(variants[name][0]) for name in variants}
        result = _result(bench, preset_name, batch_size, rates, losses)
    _tell(result)
    write_result(json_path, result)
    return result


def _result(
    bench: _Bench, preset_name: str, batch_size: int, rates: dict[str, Measured], losses: dict[str, list[Losses]]
) -> dict[str, Any]:
    differences = _differences(losses)
    halved = {name: value for name, value in differences.items() if name.endswith("bf16")}
    exact = {name: value for name, value in differences.items() if name not in halved}
    counters, pareto_tasks = bench.pareto() if preset_name == "small" else (bench.counters["ours_prefix_bf16"], [])
    matrix = {
        str(dtype).removeprefix("torch."): matrix_rate(bench.preset, dtype, bench.device) for dtype in bench.models
    }
    flops = {name: bench.needed_flops(name) * rates[name].median / len(bench.tasks) for name in bench.counters}
    share = {n: rate / matrix["bfloat16" if n.endswith("bf16") else "float32"] for n, rate in flops.items()}
    tokens_per_user = bench.preset.num_epochs * np.mean([sum(len(e.ids) for e in t.examples) for t in bench.tasks])
    return {
        "preset": preset_name,
        "batch_size": batch_size,
        "num_users": {"ours": len(bench.tasks), "rivals": bench.preset.num_rival_users},
        "num_parameters": sum(p.numel() for p in bench.lm.parameters()),
        "users_per_s": {name: rate.median for name, rate in rates.items()},
        "spread": {name: rate.spread for name, rate in rates.items()},
        "tokens_per_s": {name: rate.median * tokens_per_user for name, rate in rates.items()},
        "ratio": _ratios(rates, "trainer"),
        "ratio_to_trainer_oppu": _ratios(rates, "trainer_oppu"),
        "ratio_to_plain_loop": _ratios(rates, "plain_loop"),
        "fraction_of_ceiling": _ratios(rates, "ceiling"),
        "max_loss_difference": max(exact.values(), default=None),
        "max_loss_difference_bf16": max(halved.values(), default=None),
        "slot_occupancy": (counters.waiting if counters.waiting.num_ticks else counters.whole).occupancy,
        "slot_occupancy_with_tail": counters.whole.occupancy,
        "padding": counters.whole.padding,
        "padding_by_variant": {name: own.whole.padding for name, own in bench.counters.items()},
        "pareto_users": len(pareto_tasks),
        "matrix_flops_per_s": matrix,
        "model_flops_per_s": flops,
        "share_of_matrix_rate": share,
        "machine": machine(),
    }


def _ratios(rates: dict[str, Measured], rival: str) -> dict[str, float]:
    """Median over the repetitions of each variant's rate over the rival's in the same repetition."""
    pairs = {name: zip(rate.values, rates[rival].values, strict=True) for name, rate in rates.items()}
    return {name: Measured(tuple(mine / theirs for mine, theirs in both)).median for name, both in pairs.items()}


def _differences(losses: dict[str, list[Losses]]) -> dict[str, float]:
    """Largest difference, in any repetition, of any user's loss in any step from that of the plain loop's first."""
    reference = losses["plain_loop"][0]
    found: dict[str, float] = {}
    for name, repetitions in losses.items():
        for own in repetitions:
            pairs = zip(own, reference, strict=False)  # ours trained more users than the rivals
            largest = max(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True))
            found[name] = max(found.get(name, 0.0), largest)
    return found


def _tell(result: dict[str, Any]) -> None:
    rows = []
    for name, rate in result["users_per_s"].items():
        share = result["share_of_matrix_rate"].get(name)
        rows.append(
            [
                name,
                f"{rate:.3g}",
                f"{result['spread'][name]:.0%}",
                f"{result['tokens_per_s'][name]:,.0f}",
                f"{result['ratio'][name]:.2f}",
                f"{result['ratio_to_trainer_oppu'][name]:.2f}",
                f"{result['ratio_to_plain_loop'][name]:.2f}",
                f"{result['fraction_of_ceiling'][name]:.2f}",
                f"{share:.0%}" if share is not None else "",
            ]
        )
    columns = ["variant", "users/s", "spread", "tokens/s", "x trainer", "x trainer_oppu", "x plain loop", "of ceiling"]
    columns.append("matrix rate")
    about = (
        f"bench users, {result['preset']} ({result['num_parameters'] / 1e6:.1f} M parameters), batch size"
        f" {result['batch_size']}; medians"
    )
    exact, halved = result["max_loss_difference"], result["max_loss_difference_bf16"]
    notes = [
        "losses against the plain loop, largest difference of any user and step: "
        + ", ".join(
            f"{text} {value:.1e}" for text, value in (("same type", exact), ("bf16 base", halved)) if value is not None
        ),
        _about_slots(result),
        "tokens/s count every item's tokens, a shared prefix as often as it occurs; the matrix rate is that of"
        " torch.mm in the same run, and needed operations are 4 a parameter and computed token",
    ]
    tell(about, columns, rows, notes, result)
    on_gpu = result["machine"]["gpu"] is not None  # where all variants have a bf16 base
    for found, most in ((exact, BF16_TOLERANCE if on_gpu else LOSS_TOLERANCE), (halved, BF16_TOLERANCE)):
        if found is not None and not found <= most:
            raise UserError(
                f"the variants do not train the same: losses differ by {found:.1e}; their speeds mean nothing"
            )


def _about_slots(result: dict[str, Any]) -> str:
    about = f"padding {result['padding']:.1%}, slot occupancy {result['slot_occupancy']:.3f}"
    if not result["pareto_users"]:
        return about
    return (
        f"{about} while users wait ({result['slot_occupancy_with_tail']:.3f} with the tail);"
        f" {result['pareto_users']} users of 1 to 1,000 items in 64 slots"
    )
