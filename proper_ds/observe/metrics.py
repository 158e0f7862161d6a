"""`metrics.jsonl`: one JSON line an event, appended by one writer at a time, readable with nothing installed."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends events; every line is one write, so that a reader never sees half of one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def log(self, stage: str, **values: Any) -> None:
        """Append one event of a stage. Numbers that are not finite become null, as JSON wants."""
        event = {"time": round(time.time(), 3), "stage": stage} | {key: _plain(value) for key, value in values.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def read_events(path: Path, start: int = 0) -> tuple[list[dict[str, Any]], int]:
    """(events, offset to go on from): the complete lines from byte `start` on."""
    if not path.exists():
        return [], start
    with path.open("rb") as file:
        file.seek(start)
        data = file.read()
    end = data.rfind(b"\n") + 1
    events = [json.loads(line) for line in data[:end].splitlines() if line.strip()]
    return events, start + end
