"""Runs `proper-ds` as people do, in processes of its own, on a population small enough for a test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

REPO = Path(__file__).resolve().parents[2]
TIMEOUT_S = 400

CONFIG = {
    "base": {
        "create": {
            "vocab_size": 400,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "max_steps": 120,
            "num_tokens_per_step": 1024,
        },
        "max_length": 120,
    },
    "population": {
        "max_steps": 200,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_steps": 4,
    },
    "group": {
        "num_experts": 3,
        "max_steps": 120,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_steps": 4,
    },
    "user": {"learning_rate": 2e-2, "num_train_epochs": 2, "min_steps": 4},
    "router": {
        "max_steps": 120,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "save_steps": 4,
    },
    "distributed": {"num_ranks": 2, "deepspeed": str(REPO / "ds_configs/zero2.json")},
    "fleet": {"num_tokens_per_unit": 1500, "num_actors": 1},
    "evaluation": {"num_bootstrap_samples": 50},
}


def environment() -> dict[str, str]:
    """The test's environment without a Ray cluster to join and without a network."""
    env = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "PROPER_DS_ROOT")}
    return env | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def command(*args: str | Path) -> list[str]:
    """The command line of `proper-ds ARGS`."""
    return [sys.executable, "-m", "proper_ds", *map(str, args)]


def proper_ds(*args: str | Path, expect: int = 0) -> str:
    """Run to the end and return what it printed, errors included; the exit code must be the expected one."""
    done = subprocess.run(
        command(*args),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == expect, f"exit code {done.returncode}, expected {expect}:\n{done.stdout}"
    return done.stdout


def write_run(folder: Path, data: Path, num_actors: int = 1) -> Path:
    """A run's YAML beside its folder `folder`."""
    config = CONFIG | {
        "output_dir": str(folder),
        "data": {"path": [str(data / "generated_tags"), str(data / "generated_ratings")]},
        "fleet": CONFIG["fleet"] | {"num_actors": num_actors},
    }
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path
