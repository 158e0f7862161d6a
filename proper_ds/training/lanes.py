"""One base under several lanes of a run, for actors whose units belong to different ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from proper_ds.run_folder import RunFolder, split_lane
from proper_ds.training.context import Populations, RunContext

if TYPE_CHECKING:
    from proper_ds.config import RunConfig


class Lanes:
    """The contexts of some lanes of a run, and a base that wears the population LoRA of one of them at a time.

    Attributes:
        lm: the frozen base.
    """

    def __init__(
        self, config: RunConfig, device: torch.device, lanes: Sequence[str], *, populations: Sequence[str] | None = None
    ) -> None:
        """`populations` are the lanes whose population LoRA is wanted; by default that of each, always."""
        first = RunContext(config, device)
        self._contexts = {lane: replace(first, lane=lane) for lane in lanes}
        self.lm = first.load_lm(with_population=False)
        wanted = [self._contexts[lane] for lane in (lanes if populations is None else populations)]
        self._populations = Populations(self.lm, wanted, and_without=populations is not None)

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return next(iter(self._contexts.values())).folder

    def context(self, lane: str) -> RunContext:
        """The run as seen from a lane."""
        return self._contexts[lane]

    def wear(self, lane: str | None) -> None:
        """Merge a lane's population LoRA into the base, or none."""
        self._populations.set(lane)

    def enter(self, stage: str) -> RunContext:
        """Merge the population LoRA of a stage's lane; the run as seen from there."""
        lane = split_lane(stage)[1]
        self.wear(lane)
        return self._contexts[lane]
