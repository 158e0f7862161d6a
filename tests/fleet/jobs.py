"""Jobs for real actors in tests: they write down what they did, and misbehave where a unit's number says so."""

from __future__ import annotations

import os
import time

KILLS, FREEZES_ONCE = 3, 5


class Recorder:
    """Leaves a file for each finished unit."""

    def __init__(self, config, device):
        self._folder = config.output_path / "finished"
        self._folder.mkdir(parents=True, exist_ok=True)

    def run(self, unit):
        if unit.first == KILLS:
            os.kill(os.getpid(), 9)
        if unit.first == FREEZES_ONCE:
            frozen = self._folder / "frozen"
            if not frozen.exists():
                frozen.touch()
                os.kill(os.getpid(), 19)  # SIGSTOP
        time.sleep(0.05)
        (self._folder / unit.name).touch()
        return {"pid": os.getpid()}


class Unbuildable:
    """Its actor lives, each of its units fails."""

    def __init__(self, config, device):
        raise RuntimeError("no such weights")
