"""Logs what a rank stage's routers do with the experts: with every line of metrics, and with warnings at its end."""

from __future__ import annotations

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


class GateLog:
    """Of one stage on one rank.

    Attributes:
        stats: where the stage's module counts its texts.
    """

    def __init__(self, stage: str, section: str, level: GroupLevel) -> None:
        """`section` is where the stage is configured: warnings say what to change there."""
        self._stage, self._section, self._level = stage, section, level
        self.stats = GateStats(len(level.layout.modules), level.num_experts)
        self._last: dict[str, Any] | None = None

    def numbers(self, ranks: Ranks) -> dict[str, Any]:
        """`gates`, over all ranks since the last call (see `gate_numbers`); a collective."""
        texts, sums = self.stats.take(ranks.device)
        texts, sums = ranks.gather_rows(texts), ranks.total(sums)
        self._last = gate_numbers(texts, sums, self._level.num_experts)
        return {"gates": self._last}

    def finish(self, metrics: MetricsFile, experts: list[tuple[Tensor, Tensor]] | None) -> None:
        """Log how the stage ended, and warn of what is wrong. First rank only.

        Args:
            experts: (A [N, r, D], B [N, E, r]) of each module where the stage trained them.
        """
        alike = None
        if experts is not None:
            chosen = compared_experts(self._level.num_experts)
            alike = likeness_numbers(likeness(experts, chosen), chosen)
        is_steered = self._level.preset.constraint_gradient
        # a stage resumed after its last step has run no text
        problems = gate_problems(self._last, alike, self._section, is_steered) if self._last is not None else []
        metrics.log(self._stage, event="experts", gates=self._last, likeness=alike, problems=problems)
        for problem in problems:
            metrics.log(self._stage, warning=problem)  # for the driver's terminal
            get_logger().warning("%s: %s", self._stage, problem)
