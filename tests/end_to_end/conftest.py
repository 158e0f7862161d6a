"""One finished run that the end-to-end tests share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.runs import proper_ds, write_run


@dataclass(frozen=True)
class Finished:
    """A run that nothing disturbed.

    Attributes:
        data: the generated folders.
        output: what it printed.
    """

    data: Path
    yaml: Path
    folder: Path
    output: str


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Finished:
    root = tmp_path_factory.mktemp("runs")
    data, folder = root / "data", root / "whole"
    proper_ds("data", "generate", "--users", "40", "--groups", "3", "--seed", "5", "--out", data)
    yaml = write_run(folder, data)
    return Finished(data, yaml, folder, proper_ds("run", yaml))
