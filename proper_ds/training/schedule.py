"""Learning-rate schedules as plain functions, equal to Hugging Face's `get_scheduler` step for step.

Needed as functions because every user has a schedule of their own, and ranks resume in the middle of one.
"""

from __future__ import annotations

import math

from proper_ds.training.config import OptimSettings, Schedule


def num_warmup_steps(num_steps: int, warmup_ratio: float) -> int:
    """As Hugging Face's Trainer: rounded up."""
    return math.ceil(num_steps * warmup_ratio)


def lr_factor(schedule: Schedule, step: int, num_steps: int, num_warmup: int) -> float:
    """What the learning rate is multiplied with in the step that follows `step` finished ones."""
    if schedule == "constant":
        return 1.0
    if step < num_warmup:
        return step / max(1, num_warmup)
    if schedule == "constant_with_warmup":
        return 1.0
    if schedule == "linear":
        return max(0.0, (num_steps - step) / max(1, num_steps - num_warmup))
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def learning_rate(settings: OptimSettings, step: int, num_steps: int) -> float:
    """The learning rate of the step that follows `step` finished ones, out of `num_steps`."""
    warmup = num_warmup_steps(num_steps, settings.warmup_ratio)
    return settings.learning_rate * lr_factor(settings.lr_scheduler_type, step, num_steps, warmup)
