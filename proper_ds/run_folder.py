"""The layout of a run's folder, and the markers that say a stage's result is complete and what it was made from.

    config.yaml versions.json metrics.jsonl logs/
    prepared/ base/ tokens/ population/ features/ group/<preset>/ store/<set>/ router/<preset>/ predictions/
    report.json report.md report.html
    superseded/             results of other settings, moved aside, never deleted

Below every package that runs stages.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proper_ds.files import write_json_atomic

MARKER = "done.json"


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    root: Path

    @property
    def metrics(self) -> Path:
        """One JSON line an event."""
        return self.root / "metrics.jsonl"

    @property
    def logs(self) -> Path:
        """Log files by stage and rank or actor."""
        return self.root / "logs"

    def stage(self, name: str) -> StageFolder:
        """The folder of a stage: `population`, `group/proper`, `store/OPPU` and so on."""
        return StageFolder(self.root, name)


@dataclass(frozen=True)
class StageFolder:
    """One stage's folder and its marker."""

    root: Path
    name: str

    @property
    def path(self) -> Path:
        """Where the stage writes."""
        return self.root / self.name

    def inputs(self) -> dict[str, Any] | None:
        """What the committed result was made from, or None where there is no complete result."""
        try:
            found: dict[str, Any] = json.loads((self.path / MARKER).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return found

    def is_done(self, fingerprint: str) -> bool:
        """Whether a complete result of exactly these inputs is there."""
        found = self.inputs()
        return found is not None and found["fingerprint"] == fingerprint

    def commit(self, fingerprint: str, settings: dict[str, Any], seconds: float) -> None:
        """Mark the result complete; the last write of a stage."""
        marker = {"fingerprint": fingerprint, "settings": settings, "seconds": round(seconds, 3)}
        write_json_atomic(self.path / MARKER, marker)

    def begin(self, fingerprint: str) -> bool:
        """Make the folder ready for a result of these inputs.

        Whatever other inputs left there is moved to `superseded/`. Returns True when something was moved.
        """
        begun = self.path / "begun.json"
        moved = False
        if self.path.exists():
            try:
                same = json.loads(begun.read_text(encoding="utf-8"))["fingerprint"] == fingerprint
            except FileNotFoundError:
                same = not any(self.path.iterdir())
            if not same:
                stamp = time.strftime("%Y%m%d-%H%M%S")
                target = self.root / "superseded" / f"{self.name.replace('/', '-')}-{stamp}-{time.time_ns() % 10**6}"
                target.parent.mkdir(parents=True, exist_ok=True)
                self.path.rename(target)
                moved = True
        self.path.mkdir(parents=True, exist_ok=True)
        write_json_atomic(begun, {"fingerprint": fingerprint})
        return moved
