"""Logs what a rank stage's routers do with the experts: with every line of metrics, and with warnings at its end."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from proper_ds.distributed.ranks import Ranks
from proper_ds.model.gate_stats import (
    GateStats,
    compared_experts,
    gate_numbers,
    gate_problems,
    likeness,
    likeness_numbers,
)
from proper_ds.model.groups import GroupLevel
from proper_ds.observe.log import get_logger
from proper_ds.observe.metrics import MetricsFile

Tensor = torch.Tensor

NUM_JUDGED, _MAX_WINDOWS = 512, 32
"""How a stage ends is judged by the last lines of metrics that together saw so many texts; by so many lines at most."""


class GateLog:
    """Of one stage on one rank.

    Attributes:
        stats: where the stage's module counts its texts.
    """

    def __init__(self, stage: str, section: str, level: GroupLevel) -> None:
        """`section` is where the stage is configured: warnings say what to change there."""
        self._stage, self._section, self._level = stage, section, level
        self.stats = GateStats(len(level.layout.modules), level.num_experts)
        self._recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=_MAX_WINDOWS)

    @property
    def _sizes(self) -> tuple[int, int]:
        return self._level.num_experts, self._level.sizes.num_blocks or 1

    def drop(self) -> None:
        """Forget what was counted since the last call of `numbers`."""
        self.stats.take(torch.device("cpu"))

    def numbers(self, ranks: Ranks) -> dict[str, Any]:
        """`gates`, over all ranks since the last call (see `gate_numbers`); a collective."""
        texts, sums = self.stats.take(ranks.device)
        texts, sums = ranks.gather_rows(texts), ranks.total(sums)
        self._recent.append((texts.cpu(), sums.cpu()))
        while sum(len(other) for other, _ in self._recent) - len(self._recent[0][0]) >= NUM_JUDGED:
            self._recent.popleft()
        return {"gates": gate_numbers(texts, sums, *self._sizes)}

    def finish(self, metrics: MetricsFile, experts: list[tuple[Tensor, Tensor]] | None) -> None:
        """Log how the stage ended, by its last texts, and warn of what is wrong. First rank only.

        Args:
            experts: (A [N, r, D], B [N, E, r]) of each module where the stage trained them.
        """
        alike = None
        if experts is not None:
            chosen = compared_experts(self._level.num_experts)
            alike = likeness_numbers(likeness(experts, chosen), chosen)
        is_steered = self._level.preset.constraint_gradient
        last, problems = None, []
        if self._recent:  # a stage resumed after its last step has run no text
            texts = torch.cat([texts for texts, _ in self._recent])
            last = gate_numbers(texts, torch.stack([sums for _, sums in self._recent]).sum(0), *self._sizes)
            problems = gate_problems(last, alike, self._section, is_steered)
        metrics.log(self._stage, event="experts", gates=last, likeness=alike, problems=problems)
        for problem in problems:
            metrics.log(self._stage, warning=problem)  # for the driver's terminal
            get_logger().warning("%s: %s", self._stage, problem)
