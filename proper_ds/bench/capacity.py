"""What a fleet of users will take before any of it is bought: time, GPU-hours, memory, storage, network.

`proper-ds plan` calls `estimate`. Every line says what it rests on: a measurement, a formula or an assumption. Rates
come from a benchmark's JSON where one is given, and from the device's peak and an assumed utilisation otherwise.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proper_ds.errors import UserError

HOURS = 3600.0
ADAM_BYTES = 16
"""Weight, gradient and two moments of one trained number in fp32."""
TOKEN_BYTES = 4
STORED_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
BASE_BYTES = 2
RESERVED_SHARE = 0.25
"""Of a device's memory, for activations and the libraries."""
CATALOG_BYTES = 27
CATALOG_SOURCE = "measured: 27 bytes a user in the catalog of bench control-plane, keys of 14 letters"
CONTROL_PLANE_USERS_PER_S = 16_000.0
CONTROL_PLANE_SOURCE = "measured: bench control-plane, 2 busy CPU cores, 2026-11-20 (docs/benchmarks.md)"
MEASURED_SHARE_OF_PEAK = 0.8
CPU = "cpu"


@dataclass(frozen=True)
class Shape:
    """The part of a base's shape that costs are made of (its config.json)."""

    name: str
    hidden: int
    intermediate: int
    num_layers: int
    kv: int
    vocab: int

    @property
    def body_params(self) -> int:
        """Parameters of the layers' matrices."""
        attention = 2 * self.hidden * (self.hidden + self.kv)
        return self.num_layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_params(self) -> int:
        """Parameters of the head's matrix."""
        return self.hidden * self.vocab

    def lora_numbers(self, r: int, targets: list[str]) -> int:
        """Numbers of one adapter."""
        d, ff, kv = self.hidden, self.intermediate, self.kv
        sizes = {
            "q_proj": 2 * d,
            "k_proj": d + kv,
            "v_proj": d + kv,
            "o_proj": 2 * d,
            "gate_proj": d + ff,
            "up_proj": d + ff,
            "down_proj": d + ff,
        }
        unknown = sorted(set(targets) - set(sizes))
        if unknown or not targets:
            given = ", ".join(unknown) or "none"
            raise UserError(f"--targets: {given} given; legal are {', '.join(sizes)}")
        return r * self.num_layers * sum(sizes[target] for target in targets)


SHAPES = (
    Shape("Llama-3.2-1B", 2048, 8192, 16, 512, 128256),
    Shape("Llama-3.2-3B", 3072, 8192, 28, 1024, 128256),
    Shape("Llama-2-7B", 4096, 11008, 32, 4096, 32000),
    Shape("Llama-3.1-8B", 4096, 14336, 32, 1024, 128256),
    Shape("Llama-2-13B", 5120, 13824, 40, 5120, 32000),
    Shape("Llama-3.1-70B", 8192, 28672, 80, 1024, 128256),
)


@dataclass(frozen=True)
class Hardware:
    """One kind of device: dense bf16 FLOP/s that a large product reaches, its memory, and where that is from."""

    flops: float
    memory_bytes: float
    source: str


def _by_datasheet(tflops: float, gigabytes: float) -> Hardware:
    """Matrix products reach about the share of the datasheet's dense bf16 peak that they reach on an H200."""
    source = f"{MEASURED_SHARE_OF_PEAK:.0%} of the datasheet's {tflops:g} TFLOP/s"
    return Hardware(tflops * 1e12 * MEASURED_SHARE_OF_PEAK, gigabytes * 1e9, source)


HARDWARE: dict[str, Hardware | None] = {
    "h200": Hardware(790e12, 141e9, "790 TFLOP/s of bf16 matrix products"),
    "h100": _by_datasheet(989, 80),
    "a100": _by_datasheet(312, 80),
    "l40s": _by_datasheet(362, 48),
    CPU: None,
}


@dataclass(frozen=True)
class Demand:
    """What is to be trained.

    Attributes:
        prefix_tokens: tokens at the beginning of an item that all of a user's items share, computed once a step.
        target_share: share of the tokens that are answers; only these need the head.
        num_sets: adapters of a user: OPPU, proper and proper-released are one each.
    """

    num_users: int
    base_params: float
    items_per_user: float = 8
    tokens_per_item: float = 96
    prefix_tokens: float = 0
    num_epochs: int = 3
    batch_size: int = 4
    r: int = 4
    targets: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    dtype: str = "bfloat16"
    target_share: float = 0.15
    num_sets: int = 1

    def tokens_per_user(self) -> float:
        """Tokens computed for one user and set, over all epochs."""
        steps = math.ceil(self.items_per_user / self.batch_size)
        own = self.items_per_user * (self.tokens_per_item - self.prefix_tokens)
        return self.num_epochs * (own + steps * self.prefix_tokens if self.prefix_tokens else own)


@dataclass(frozen=True)
class Measured:
    """A rate that was measured.

    Attributes:
        flops: model FLOP/s that one device reached: 4 FLOP a parameter and token.
        device: what it was, such as `nvidia h200` or `cpu`.
    """

    flops: float
    device: str
    source: str


@dataclass(frozen=True)
class Line:
    """One line of the plan: what, how much, and what that rests on."""

    what: str
    value: str
    basis: str


def nearest_shape(base_params: float) -> tuple[Shape, float]:
    """(the known shape of the nearest size, how many times larger the base is)."""
    shape = min(SHAPES, key=lambda known: abs(math.log(base_params / (known.body_params + known.head_params))))
    ratio = base_params / (shape.body_params + shape.head_params)
    return shape, 1.0 if 0.8 < ratio < 1.25 else ratio


def _flops_of_user(workload: dict[str, Any]) -> float:
    """Model FLOP of one user of a benchmark's workload."""
    kv = workload["hidden_size"] * workload["num_kv_heads"] // workload["num_heads"]
    hidden, wide, num_layers = (workload[name] for name in ("hidden_size", "intermediate_size", "num_layers"))
    shape = Shape("measured", hidden, wide, num_layers, kv, workload["vocab_size"])
    tokens = workload["num_items"] * workload["num_epochs"] * (workload["shortest"] + workload["longest"]) / 2
    return float(tokens * 4 * (shape.body_params + workload["target_share"] * shape.head_params))


def read_measured(path: Path) -> Measured:
    """The best rate of a benchmark's JSON (`bench scaling`, `bench users`), of whatever model, as FLOP/s of a device.

    Raises:
        UserError: where the file is no such JSON.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        machine = found["machine"]
        device = (machine["gpu"] or CPU).lower()
        where = f"{machine['gpu'] or machine['cpu']}, {machine['date']}"
        if "model_flops_per_s" in found:
            best, flops = max(found["model_flops_per_s"].items(), key=lambda item: item[1])
            source = f"{path.name}: {best} of preset {found['preset']} on {where}"
            return Measured(flops, device, source)
        rates = {name: variant["median_users_per_s"] for name, variant in found["variants"].items()}
        one_device = rates.get("1", max(rates.values()))
        source = f"{path.name}: {one_device:,.1f} users/s of one actor on {where}"
        return Measured(one_device * _flops_of_user(found["workload"]), device, source)
    except (OSError, ValueError) as error:
        raise UserError(f"--measured {path}: {error}; give a JSON that `proper-ds bench scaling` wrote") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--measured {path}: it has no users/s of a known workload ({error!r}); give a JSON that"
            " `proper-ds bench scaling` or `bench users` wrote"
        ) from None


def estimate(
    demand: Demand, hardware: str, num_gpus: int, mfu: float | None = None, measured: Measured | None = None
) -> list[Line]:
    """The plan, line by line.

    Args:
        mfu: assumed share of the device's FLOP/s, 0.5 where it is None; not with `measured`.

    Raises:
        UserError: for hardware, targets or sizes that make no sense.
    """
    device = _checked(demand, hardware, mfu, measured)
    shape, ratio = nearest_shape(demand.base_params)
    like = f"shape of {shape.name}" + ("" if ratio == 1.0 else f", scaled to {demand.base_params:.3g} parameters")
    params = (shape.body_params + demand.target_share * shape.head_params) * ratio
    # parameters grow as width^2 x layers, adapters as width x layers; larger bases grow in both
    numbers = shape.lora_numbers(demand.r, list(demand.targets)) * ratio ** (2 / 3)
    tokens = demand.tokens_per_user() * demand.num_sets
    flops = tokens * (4 * params + 6 * numbers)
    share = mfu if mfu is not None else 0.5
    if measured is not None:
        rate, rate_basis = measured.flops, f"measured: {measured.source}"
    else:
        assert device is not None, "checked"
        rate, rate_basis = device.flops * share, f"assumed: {share:.0%} of {device.source}"
    users_per_s = rate / flops
    hours = demand.num_users / users_per_s / HOURS
    each = numbers * STORED_BYTES[demand.dtype] * demand.num_sets
    return [
        Line("tokens a user", f"{tokens:,.0f}", _tokens_basis(demand)),
        Line(
            "work a user",
            f"{flops / 1e12:,.2f} TFLOP",
            f"formula: 4 FLOP a parameter and token, head at answers; {like}",
        ),
        Line("device", f"{rate / 1e12:,.3g} TFLOP/s", rate_basis),
        Line("users", f"{users_per_s * HOURS:,.0f} an hour and device", "formula: the device's rate over the work"),
        Line("GPU-hours", f"{hours:,.1f}", "formula: users over that"),
        Line(
            "time",
            f"{_duration(hours / num_gpus * HOURS)} on {num_gpus} x {hardware}",
            "formula: users are independent",
        ),
        *_control_plane(users_per_s * num_gpus),
        *(_memory(demand, device, numbers) if device is not None else []),
        Line(
            "adapter", f"{numbers:,.0f} numbers, {_size(each)} in {demand.dtype}", f"formula: rank {demand.r}; {like}"
        ),
        Line("storage", _size(each * demand.num_users), "formula: users x adapter, one version"),
        Line("catalog", _size(CATALOG_BYTES * demand.num_users * demand.num_sets), CATALOG_SOURCE),
        *_network(demand, each, users_per_s, num_gpus),
    ]


def _checked(demand: Demand, hardware: str, mfu: float | None, measured: Measured | None) -> Hardware | None:
    if hardware not in HARDWARE:
        raise UserError(f"--hardware {hardware!r} is not known; legal are {', '.join(HARDWARE)}")
    if demand.dtype not in STORED_BYTES:
        raise UserError(f"--dtype {demand.dtype!r} is not known; legal are {', '.join(STORED_BYTES)}")
    if measured is None and hardware == CPU:
        raise UserError("--hardware cpu: no rate is known of it; give one with --measured FILE")
    if measured is not None and hardware not in measured.device:
        raise UserError(f"--measured is of {measured.device}, --hardware is {hardware}; they must be the same")
    if mfu is not None and measured is not None:
        raise UserError("--mfu has no effect with --measured, whose rate is used; leave one of them out")
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu:g} is no share of the device's peak; give more than 0 and at most 1")
    if not 0 <= demand.prefix_tokens < demand.tokens_per_item:
        raise UserError(
            f"--prefix-tokens {demand.prefix_tokens:g} must be less than --tokens-per-item {demand.tokens_per_item:g}"
        )
    if not demand.num_users >= 1 or not demand.base_params >= 1e5:
        raise UserError("--users must be at least 1 and --base-params at least 1e5")
    return HARDWARE[hardware]


def _tokens_basis(demand: Demand) -> str:
    items = f"{demand.items_per_user:g} items x {demand.tokens_per_item:g} tokens x {demand.num_epochs} epochs"
    prefix = f", {demand.prefix_tokens:g} of them once a step of {demand.batch_size}" if demand.prefix_tokens else ""
    sets = f" x {demand.num_sets} sets" if demand.num_sets > 1 else ""
    return f"assumed: {items}{prefix}{sets}"


def _control_plane(users_per_s: float) -> list[Line]:
    share = users_per_s / CONTROL_PLANE_USERS_PER_S
    value = f"{share:.1%} of {CONTROL_PLANE_USERS_PER_S:,.0f} users/s"
    return [Line("control plane", value + (", THE BOTTLENECK" if share > 1 else ""), CONTROL_PLANE_SOURCE)]


def _memory(demand: Demand, device: Hardware, numbers: float) -> list[Line]:
    base = demand.base_params * BASE_BYTES
    left = device.memory_bytes * (1 - RESERVED_SHARE) - base
    if left < numbers * ADAM_BYTES:
        value = f"the base takes {_size(base)} of {_size(device.memory_bytes)}: it does not fit one device"
    else:
        value = f"{int(left / (numbers * ADAM_BYTES)):,} users side by side beside a base of {_size(base)}"
    return [
        Line("memory", value, f"formula: 16 bytes a number in training; assumed: {RESERVED_SHARE:.0%} for the rest")
    ]


def _network(demand: Demand, each: float, users_per_s: float, num_gpus: int) -> list[Line]:
    rate = each * users_per_s
    raw = demand.num_users * demand.items_per_user * demand.tokens_per_item * TOKEN_BYTES
    once = demand.base_params * BASE_BYTES * num_gpus
    return [
        Line(
            "to the store", f"{_size(rate)}/s a device, {_size(rate * num_gpus)}/s in all", "formula: adapters as made"
        ),
        Line(
            "to the devices",
            f"{_size(once)} of base once, {_size(raw)} of tokens",
            "formula: base and data in bf16, int32",
        ),
        Line("between devices", "0 B", "formula: users share no gradient"),
    ]


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            return f"{num_bytes:,.3g} {unit}" if num_bytes < 1000 else f"{num_bytes:,.0f} {unit}"
        num_bytes /= 1000
    raise AssertionError("unreachable")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * HOURS else f"{seconds / HOURS:,.1f} h"
