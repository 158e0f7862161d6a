"""The layout of a run's folder, and the markers that say a stage's result is complete and what it was made from.

    config.yaml versions.json metrics.jsonl logs/
    prepared/ base/ tokens/ population/ features/ group/<preset>/ store/<set>/ router/<preset>/ predictions/
    report.json report.md report.html
    superseded/             results of other settings, moved aside, never deleted

Below every package that runs stages.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proper_ds.errors import UserError
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

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second driver out while the block runs; a killed one lets go by itself.

        Raises:
            UserError: where another driver is at work in this folder, naming it.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir {self.root} cannot be made ({error.strerror}); give another") from None
        with (self.root / ".lock").open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                who = file.read().strip() or "unknown"
                raise UserError(
                    f"output_dir {self.root}: another run is at work there ({who}); wait for it, stop it, or give"
                    " another output_dir"
                ) from None
            except OSError as error:  # some network file systems have no locks
                logging.getLogger("proper_ds").warning(
                    "output_dir %s cannot be locked (%s): see to it yourself that only one run works there",
                    self.root,
                    error.strerror,
                )
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
            yield


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
        """Mark the result complete, the last write of a stage; what killed writers left behind is removed before."""
        for left in self.path.rglob(".*.tmp"):
            left.unlink(missing_ok=True)
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
