"""The layout of a run's folder, and the markers that say a stage's result is complete and what it was made from.

    config.yaml versions.json metrics.jsonl logs/
    prepared/ base/ tokens/ population/ features/ group/<preset>/ store/<set>/ router/<preset>/
    predictions/<method>/   answers; `lamp/` holds them in LaMP's format
    <stage>@<lane>/         a stage of a lane: under prompts other than the plain ones
    report.json report.md report.html predictions.sha256
    superseded/             results of other settings, moved aside, never deleted
    roster.parquet          users by index, so that a nightly update keeps their places (pipeline/roster.py)
    test_reads.jsonl        for which configurations test users were read (evaluation/test_reads.py)
    stores.jsonl            adapter stores outside the run's folder (store/elsewhere.py)
    forgotten.json forgotten/ exports.jsonl     who is kept out, receipts, adapters written elsewhere (erasure/)

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
BEGUN = "begun.json"


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    root: Path

    @property
    def metrics(self) -> Path:
        """One JSON line an event."""
        return self.root / "metrics.jsonl"

    @property
    def roster(self) -> Path:
        """Users by index; see `pipeline/roster.py`."""
        return self.root / "roster.parquet"

    @property
    def logs(self) -> Path:
        """Log files by stage and rank or actor."""
        return self.root / "logs"

    def superseded(self, name: str) -> list[Path]:
        """Results of a stage that were moved aside, oldest first."""
        stem = name.replace("/", "-")
        return sorted(path for path in (self.root / "superseded").glob(f"{stem}-*") if stage_of(path) == stem)

    def stage(self, name: str) -> StageFolder:
        """The folder of a stage: `population`, `group/proper`, `store/OPPU@bm25-4-lamp` and so on."""
        return StageFolder(self.root, name)

    def in_all_lanes(self, name: str) -> list[StageFolder]:
        """A stage's folders that are there, of all lanes."""
        found = [self.root / name, *self.root.glob(f"{name}@*")]
        return [StageFolder(self.root, str(path.relative_to(self.root))) for path in sorted(found) if path.exists()]

    def predictions(self) -> list[StageFolder]:
        """The folders of all methods' answers."""
        return [self.stage(f"predictions/{path.name}") for path in sorted(self.root.glob("predictions/*/"))]

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
        return _read(self.path / MARKER)

    def begun(self) -> dict[str, Any] | None:
        """What the last attempt was begun for, finished or not; None where there was none."""
        return _read(self.path / BEGUN)

    def is_done(self, fingerprint: str) -> bool:
        """Whether a complete result of exactly these inputs is there."""
        found = self.inputs()
        return found is not None and found["fingerprint"] == fingerprint

    def commit(
        self, fingerprint: str, settings: dict[str, Any], seconds: float, made_from: dict[str, Any] | None = None
    ) -> None:
        """Mark the result complete, the last write of a stage; what killed writers left behind is removed before.

        Args:
            made_from: fingerprints of the stages before it and whatever else an update must recognise later.
        """
        for left in self.path.rglob(".*.tmp"):
            left.unlink(missing_ok=True)
        marker = {
            "fingerprint": fingerprint,
            "settings": settings,
            "seconds": round(seconds, 3),
            "made_from": made_from or {},
            "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        write_json_atomic(self.path / MARKER, marker)

    def begin(self, fingerprint: str, about: dict[str, Any] | None = None, update: bool = False) -> bool:
        """Make the folder ready for a result of these inputs.

        Whatever other inputs left there is moved to `superseded/`, unless it is to be brought up to date in place.

        Args:
            about: kept beside the fingerprint for `begun`.
            update: whether what is there stays.

        Returns:
            Whether something was moved.
        """
        moved = False
        if self.path.exists():
            begun = self.begun()
            if begun is not None and begun["fingerprint"] == fingerprint:
                return False
            same = begun is None and not any(self.path.iterdir())
            if not same and not update:
                stamp = time.strftime("%Y%m%d-%H%M%S")
                stem = self.name.replace("/", "-")
                target = self.root / "superseded" / f"{stem}-{stamp}-{time.time_ns() % 10**9:09d}"
                target.parent.mkdir(parents=True, exist_ok=True)
                self.path.rename(target)
                moved = True
        self.path.mkdir(parents=True, exist_ok=True)
        write_json_atomic(self.path / BEGUN, {"fingerprint": fingerprint} | (about or {}))
        return moved


def stage_of(path: Path) -> str:
    """The stage, slashes as hyphens, that a folder in `superseded/` was made by."""
    return path.name.rsplit("-", 3)[0]


def in_lane(name: str, lane: str) -> str:
    """The full name of a stage, or of a set of adapters, in a lane; the plain lane is ""."""
    return f"{name}@{lane}" if lane else name


def split_lane(name: str) -> tuple[str, str]:
    """(name within the lane, lane) of a stage or a set of adapters."""
    own, _, lane = name.partition("@")
    return own, lane


def base_under(root: Path, name: str) -> tuple[str, str | None]:
    """(base, revision) under the population adapter of the lane that a set or a level is of.

    It is what the population was trained for, whatever the run's YAML says by now.

    Raises:
        UserError: where the run has no such population adapter.
    """
    adapter = root / in_lane("population", split_lane(name)[1]) / "adapter"
    made_for = _read(adapter / "adapter_config.json")
    if made_for is None:
        raise UserError(f"{root} has no {adapter.relative_to(root)}, on which {name} was trained")
    base = Path(made_for["base_model_name_or_path"])
    if base.name == "base" and base.is_absolute() and not base.exists() and (root / "base").exists():
        return str(root / "base"), made_for["revision"]  # the run made it, and its folder has been moved since
    return str(made_for["base_model_name_or_path"]), made_for["revision"]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return found
