"""The most memory that a process held since it was asked to watch: on a GPU its tensors, else what it wrote itself.

Used by benchmarks on ranks. On CPUs it is resident memory without files that are mapped (Linux tells it; elsewhere all
resident memory), read every few milliseconds: what lives shorter may be missed.
"""

from __future__ import annotations

import threading

import psutil
import torch

SAMPLE_S = 0.002


class PeakMemory:
    """Watches this process from `begin` to `take`."""

    def __init__(self) -> None:
        self._process, self._peak = psutil.Process(), 0
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Forget what was, and watch."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        self._end.clear()
        self._peak = self.now()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def take(self) -> int:
        """Stop watching; the most bytes since `begin`."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        assert self._thread is not None, "begin first"
        self._end.set()
        self._thread.join()
        return max(self._peak, self.now())

    def now(self) -> int:
        """Bytes held now."""
        if torch.cuda.is_available():
            return torch.cuda.memory_allocated()
        memory = self._process.memory_info()
        return int(memory.rss - getattr(memory, "shared", 0))

    def _watch(self) -> None:
        while not self._end.wait(SAMPLE_S):
            self._peak = max(self._peak, self.now())
