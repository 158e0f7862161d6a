"""The capacity plan: its sums against ones done by hand, its errors, and that more of anything never costs less."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from proper_ds.bench.capacity import SHAPES, Demand, estimate, nearest_shape, read_measured
from proper_ds.cli import app
from proper_ds.errors import UserError
from proper_ds.model.base import find_targets
from proper_ds.model.config import FEED_FORWARD, LoraSettings
from proper_ds.model.lora import LoraLayout

LIGHT_7B = Demand(1_000_000, 6.6e9, r=8, targets=("q_proj", "v_proj"))


def line(demand, what, *args, **kwargs):
    (found,) = [line for line in estimate(demand, *args, **kwargs) if line.what == what]
    return found


def number(text):
    return float(re.match(r"[\d.,]+", text)[0].replace(",", ""))


def gpu_hours(demand):
    return number(line(demand, "GPU-hours", "h200", 1).value)


def test_a_million_light_users_of_a_7b_base():
    """2,304 tokens x 4 x (6.476 + 0.15 x 0.131) billion FLOP, over half of 790 TFLOP/s: 42 hours."""
    assert line(LIGHT_7B, "tokens a user", "h200", 1).value == "2,304"
    assert gpu_hours(LIGHT_7B) == pytest.approx(42.1, abs=0.2)
    assert line(LIGHT_7B, "storage", "h200", 1).value == "8.39 TB"
    assert line(LIGHT_7B, "time", "h200", 64).value == "40 min on 64 x h200"
    shared = dataclasses.replace(LIGHT_7B, prefix_tokens=48)
    assert gpu_hours(shared) == pytest.approx(26.3, abs=0.2)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], FEED_FORWARD, ["k_proj", "o_proj", "up_proj"]])
def test_adapter_sizes_are_those_of_the_real_layout(targets):
    shape = SHAPES[0]
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=shape.hidden // 64,
        intermediate_size=shape.intermediate // 64,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    small = dataclasses.replace(
        shape, hidden=config.hidden_size, intermediate=config.intermediate_size, kv=config.hidden_size // 4, vocab=64
    )
    lm = LlamaForCausalLM(config)
    layout = LoraLayout.of(find_targets(lm, targets), LoraSettings(r=4, target_modules=targets))
    assert small.lora_numbers(4, targets) == layout.num_parameters
    body = sum(p.numel() for name, p in lm.named_parameters() if "proj" in name)
    assert small.body_params == body


MORE = [("num_users", 2), ("base_params", 1.5), ("items_per_user", 3), ("tokens_per_item", 2), ("num_epochs", 2)]


@given(st.sampled_from(MORE), st.floats(1e8, 1e11), st.floats(1e4, 1e7))
def test_more_of_anything_costs_no_less(change, base_params, num_users):
    name, times = change
    demand = Demand(int(num_users), base_params)
    more = dataclasses.replace(demand, **{name: type(getattr(demand, name))(getattr(demand, name) * times)})
    assert gpu_hours(more) >= gpu_hours(demand)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_known_base_has_its_own_shape(shape):
    assert nearest_shape(shape.body_params + shape.head_params) == (shape, 1.0)


def write_json(path, gpu):
    workload = {
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 4,
        "vocab_size": 1024,
        "num_items": 8,
        "num_epochs": 1,
        "shortest": 16,
        "longest": 48,
        "target_share": 0.15,
    }
    variants = {"1": {"median_users_per_s": 100.0}, "2": {"median_users_per_s": 190.0}}
    found = {"workload": workload, "variants": variants, "machine": {"gpu": gpu, "cpu": "some", "date": "2026-11-20"}}
    path.write_text(json.dumps(found), encoding="utf-8")
    return path


def test_a_measured_rate_takes_the_place_of_the_assumed_one(tmp_path):
    """100 users/s x 256 tokens x 4 x (4 x (4 x 128^2 + 3 x 128 x 344) + 0.15 x 131,072) = 82.96 GFLOP/s."""
    measured = read_measured(write_json(tmp_path / "rate.json", "NVIDIA H200"))
    assert measured.flops == pytest.approx(82.96e9, rel=1e-3)
    device = line(LIGHT_7B, "device", "h200", 1, measured=measured)
    assert device.basis.startswith("measured: rate.json")
    assert device.value == "0.083 TFLOP/s"


def test_what_makes_no_sense_is_refused(tmp_path):
    on_cpu = read_measured(write_json(tmp_path / "cpu.json", None))
    assert line(LIGHT_7B, "time", "cpu", 2, measured=on_cpu).value.endswith("2 x cpu")
    with pytest.raises(UserError, match="must be the same"):
        estimate(LIGHT_7B, "h200", 1, measured=on_cpu)
    with pytest.raises(UserError, match="legal are h200, h100"):
        estimate(LIGHT_7B, "tpu", 1)
    with pytest.raises(UserError, match="--measured FILE"):
        estimate(LIGHT_7B, "cpu", 1)
    with pytest.raises(UserError, match="--mfu has no effect"):
        estimate(LIGHT_7B, "cpu", 1, mfu=0.4, measured=on_cpu)
    with pytest.raises(UserError, match="more than 0 and at most 1"):
        estimate(LIGHT_7B, "h200", 1, mfu=40)
    with pytest.raises(UserError, match="--prefix-tokens 96 must be less"):
        estimate(dataclasses.replace(LIGHT_7B, prefix_tokens=96), "h200", 1)
    with pytest.raises(UserError, match="--targets: query given; legal are q_proj"):
        estimate(dataclasses.replace(LIGHT_7B, targets=("query",)), "h200", 1)
    with pytest.raises(UserError, match="--dtype 'fp8'"):
        estimate(dataclasses.replace(LIGHT_7B, dtype="fp8"), "h200", 1)
    with pytest.raises(UserError, match=r"no users/s of a known workload \(KeyError\('machine'\)\)"):
        (tmp_path / "other.json").write_text("{}", encoding="utf-8")
        read_measured(tmp_path / "other.json")
    with pytest.raises(UserError, match="No such file"):
        read_measured(tmp_path / "missing.json")


def test_a_base_that_fits_no_device_is_said_so():
    assert "does not fit one device" in line(Demand(10, 70e9), "memory", "h200", 8).value


def test_the_rate_of_bench_users_is_read(tmp_path):
    machine = {"gpu": "NVIDIA H200", "cpu": "some", "date": "2026-11-20"}
    found = {"preset": "1b", "machine": machine, "model_flops_per_s": {"ours": 1e14, "ours_prefix_bf16": 3e14}}
    (tmp_path / "users.json").write_text(json.dumps(found))
    measured = read_measured(tmp_path / "users.json")
    assert measured.flops == 3e14
    assert measured.device == "nvidia h200"
    assert "ours_prefix_bf16 of preset 1b" in measured.source


NOT_FINITE = [(option, value) for option in ("--users", "--base-params", "--mfu") for value in ("nan", "inf")]


@pytest.mark.parametrize(("option", "value"), [*NOT_FINITE, ("--items-per-user", "inf"), ("--tokens-per-item", "inf")])
def test_amounts_that_are_not_finite_are_refused_on_the_command_line(option, value):
    given = {"--users": "1e6", "--base-params": "8e9"} | {option: value}
    result = CliRunner().invoke(app, ["plan", *(word for pair in given.items() for word in pair)])
    assert isinstance(result.exception, UserError), result.output
    assert f"{option} {value} is no amount" in str(result.exception)
