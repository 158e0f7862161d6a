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


class SpoiltByItsFirst:
    """The first unit that any process gets fails, and so does all else there, as after an error of CUDA."""

    def __init__(self, config, device):
        self._began = config.output_path / "began"
        self._is_spoilt = False

    def run(self, unit):
        if not self._began.exists():
            self._began.touch()
            self._is_spoilt = True
        if self._is_spoilt:
            raise RuntimeError(f"an illegal memory access, said of user {unit.first}")
        return {}
