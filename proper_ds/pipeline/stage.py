"""One stage of one run as data; `stages.py` makes them, everything that runs or copies results reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from proper_ds.run_folder import RunFolder

Where = Literal["driver", "ranks", "fleet"]
REPORT = "report.json"


@dataclass(frozen=True)
class Stage:
    """One stage of one run.

    Attributes:
        name: its folder below the run, with its lane.
        step: what people call it (see STEPS).
        where: who runs it.
        settings: everything it depends on besides the stages before it.
        before: names of the stages before it.
        fingerprint: of the settings and of the stages before it.
        made_from: fingerprints of the stages before it, and what an update must recognise later.
        kept_since: when a result was made that is kept although the data changed; "" for all others.
        is_update: whether adapters that are there stay, and only those of changed users are trained.
    """

    name: str
    step: str
    where: Where
    settings: dict[str, Any]
    before: tuple[str, ...]
    fingerprint: str
    made_from: dict[str, Any]
    kept_since: str = ""
    is_update: bool = False

    @property
    def about(self) -> dict[str, Any]:
        """What is written down when the stage begins."""
        return {"settings": self.settings, "made_from": self.made_from}

    def is_done(self, folder: RunFolder) -> bool:
        """Whether a run has a result of exactly these inputs; the report's files lie in the run's root."""
        if self.step == "report" and not (folder.root / REPORT).exists():
            return False
        return folder.stage(self.name).is_done(self.fingerprint)
