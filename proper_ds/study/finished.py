"""What is known of a run of a study that has its report: the runner makes them, the study's tables are made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATE = "study.json"
"""In a study's folder: each planned run and whether it is done; `runner.py` keeps it."""


@dataclass(frozen=True)
class FinishedRun:
    """One run with a report.

    Attributes:
        task: the study's name of the task; its overrides choose the data.
        variant: the study's name of the variant; `main` where the study has none.
        folder: the run's folder, with `report.json`, `predictions/` and `config.yaml`.
        report: what `report.json` holds.
        config_hash: digest of the whole configuration, as the report has it.
        seconds: what all stages took that stand behind the report, also those adopted from a sibling run.
    """

    task: str
    variant: str
    seed: int
    folder: Path
    report: dict[str, Any]
    config_hash: str
    seconds: float

    @property
    def name(self) -> str:
        """For messages, and the run's place below the study's folder."""
        return str(self.folder.relative_to(self.folder.parent.parent))
