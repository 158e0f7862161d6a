"""Writes down what a run is: the resolved configuration and the versions of everything it stands on."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

import yaml

from proper_ds import __version__
from proper_ds.files import write_json_atomic, write_text_atomic
from proper_ds.run_folder import RunFolder

if TYPE_CHECKING:
    from proper_ds.config import RunConfig

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "datasets",
    "ray",
    "pydantic",
    "pyarrow",
    "safetensors",
    "numpy",
)


def versions() -> dict[str, Any]:
    """Versions of proper_ds, Python and the packages that results depend on, and the machine."""
    return {
        "proper_ds": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
    } | {name: metadata.version(name) for name in PACKAGES}


def record_run(config: RunConfig, folder: RunFolder) -> None:
    """Write `config.yaml` and `versions.json` into the run's folder."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_text_atomic(folder.root / "config.yaml", text)
    write_json_atomic(folder.root / "versions.json", versions())
