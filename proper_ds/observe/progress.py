"""Progress of the running stage: one live bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from proper_ds.observe.log import get_logger
from proper_ds.observe.metrics import read_events

LINE_INTERVAL_S = 10.0


class ProgressView:
    """What the driver shows while it works; `report` may be called as often as one likes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._tasks: dict[str, int] = {}
        self._last_line_s = 0.0
        self._last_text = ""

    @contextmanager
    def running(self) -> Iterator[ProgressView]:
        """Show progress while the block runs."""
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            with Progress(*columns, console=self.console, transient=True) as bar:
                self._bar, self._tasks = bar, {}
                try:
                    yield self
                finally:
                    self._bar = None
        else:
            yield self

    def report(self, what: str, done: int, total: int | None, note: str = "") -> None:
        """Show that `done` of `total` (None: unknown) of `what` is finished."""
        if self._bar is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bar.add_task(what, total=total, note=note)
            self._bar.update(self._tasks[what], completed=done, total=total, note=note)  # type: ignore[arg-type]
            return
        finished = total is not None and done >= total
        now = time.monotonic()
        of = f"{done}/{total}" if total is not None else str(done)
        text = f"{what}: {of}" + (f"  {note}" if note else "")
        if text != self._last_text and (finished or now - self._last_line_s >= LINE_INTERVAL_S):
            self._last_line_s, self._last_text = now, text
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def follow_metrics(path: Path, view: ProgressView, interval_s: float = 0.5) -> Iterator[None]:
    """Show the steps and warnings that ranks append to `metrics.jsonl` while the block runs."""
    stop = threading.Event()
    offset = path.stat().st_size if path.exists() else 0

    def follow() -> None:
        position = offset
        while True:
            ended = stop.wait(interval_s)
            events, position = read_events(path, position)
            for event in events:
                if "step" in event and "num_steps" in event:
                    loss = event.get("loss")
                    note = f"loss {loss:.4f}" if isinstance(loss, float) else ""
                    view.report(event["stage"], event["step"], event["num_steps"], note)
                if "warning" in event:
                    get_logger().warning("%s: %s", event["stage"], event["warning"])
            if ended:
                return

    thread = threading.Thread(target=follow, name="follow-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)
