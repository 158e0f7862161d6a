"""Learning-rate schedules as plain functions, equal to Hugging Face's `get_scheduler` step for step.

Needed as functions because every user has a schedule of their own, and ranks resume in the middle of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from proper_ds.training.config import OptimSettings, Schedule

_WAVES = ("linear", "cosine", "1-sqrt")
LEGAL: dict[str, dict[str, type | tuple[str, ...]]] = {
    "cosine": {"num_cycles": float},
    "cosine_with_restarts": {"num_cycles": int},
    "cosine_with_min_lr": {"num_cycles": float, "min_lr": float, "min_lr_rate": float},
    "polynomial": {"lr_end": float, "power": float},
    "inverse_sqrt": {"timescale": int},
    "warmup_stable_decay": {
        "num_decay_steps": int,
        "num_stable_steps": int,
        "warmup_type": _WAVES,
        "decay_type": _WAVES,
        "min_lr_ratio": float,
        "num_cycles": float,
    },
}
"""What `lr_scheduler_kwargs` may hold for each schedule: a type, or the legal words."""

Shape = Callable[[float], float]
"""Progress from 0 to 1 -> factor."""

_WARMUPS: dict[str, Shape] = {
    "linear": lambda done: done,
    "cosine": lambda done: 0.5 * (1 - math.cos(math.pi * done)),
    "1-sqrt": lambda done: 1 - math.sqrt(1 - done),
}


def num_warmup_steps(num_steps: int, settings: OptimSettings) -> int:
    """As Hugging Face's Trainer: `warmup_steps` where given, else the ratio's share, rounded up."""
    if settings.warmup_steps is not None:
        return settings.warmup_steps
    return math.ceil(num_steps * settings.warmup_ratio)


def lr_factor(
    schedule: Schedule,
    step: int,
    num_steps: int,
    num_warmup: int,
    given: Mapping[str, float | str] | None = None,
    learning_rate: float = 1.0,
) -> float:
    """What the learning rate is multiplied with in the step that follows `step` finished ones.

    Args:
        given: `lr_scheduler_kwargs`.
        learning_rate: the highest; some schedules end at a rate of their own.
    """
    kwargs = dict(given or {})
    if schedule == "constant":
        return 1.0
    if schedule == "warmup_stable_decay":
        return _warmup_stable_decay(step, num_steps, num_warmup, kwargs)
    if step < num_warmup:
        return step / max(1, num_warmup)
    if schedule == "constant_with_warmup":
        return 1.0
    if schedule == "inverse_sqrt":
        timescale = float(kwargs.get("timescale") or num_warmup or 10_000)
        return 1 / math.sqrt((step + timescale - num_warmup) / timescale)
    if schedule == "polynomial":
        end = float(kwargs.get("lr_end", 1e-7)) / learning_rate
        left = 1 - (step - num_warmup) / max(1, num_steps - num_warmup)
        return end if step > num_steps else (1 - end) * left ** float(kwargs.get("power", 1.0)) + end
    if schedule == "linear":
        return max(0.0, (num_steps - step) / max(1, num_steps - num_warmup))
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    if schedule == "cosine_with_restarts":
        wave = (float(kwargs.get("num_cycles", 1)) * progress) % 1.0
        return 0.0 if progress >= 1 else max(0.0, 0.5 * (1 + math.cos(math.pi * wave)))
    least = 0.0
    if schedule == "cosine_with_min_lr":
        least = float(kwargs["min_lr"]) / learning_rate if "min_lr" in kwargs else float(kwargs["min_lr_rate"])
    return max(0.0, _cosine(progress, kwargs) * (1 - least) + least)


def _cosine(progress: float, kwargs: Mapping[str, float | str]) -> float:
    return 0.5 * (1 + math.cos(math.pi * float(kwargs.get("num_cycles", 0.5)) * 2 * progress))


def _warmup_stable_decay(step: int, num_steps: int, num_warmup: int, kwargs: Mapping[str, float | str]) -> float:
    least, num_decay = float(kwargs.get("min_lr_ratio", 0)), int(kwargs["num_decay_steps"])
    num_stable = int(kwargs.get("num_stable_steps", num_steps - num_warmup - num_decay))
    if step < num_warmup:
        factor = _WARMUPS[str(kwargs.get("warmup_type", "linear"))](step / max(1, num_warmup))
        return max(0.0, factor * (1 - least) + least)
    if step < num_warmup + num_stable:
        return 1.0
    if step >= num_warmup + num_stable + num_decay:
        return least
    progress = (step - num_warmup - num_stable) / max(1, num_decay)
    decays = {"linear": 1 - progress, "cosine": _cosine(progress, kwargs), "1-sqrt": 1 - math.sqrt(progress)}
    return max(0.0, decays[str(kwargs.get("decay_type", "cosine"))] * (1 - least) + least)


def learning_rate(settings: OptimSettings, step: int, num_steps: int) -> float:
    """The learning rate of the step that follows `step` finished ones, out of `num_steps`."""
    warmup, kwargs = num_warmup_steps(num_steps, settings), settings.lr_scheduler_kwargs
    factor = lr_factor(settings.lr_scheduler_type, step, num_steps, warmup, kwargs, settings.learning_rate)
    return settings.learning_rate * factor


def wrong_kwargs(settings: OptimSettings) -> list[tuple[str, str]]:
    """(what is wrong with `lr_scheduler_kwargs`, how to mend it), for the configuration checks."""
    kind, given = settings.lr_scheduler_type, settings.lr_scheduler_kwargs
    legal = LEGAL.get(kind, {})
    found = []
    for name, value in given.items():
        wanted = legal.get(name)
        if wanted is None:
            found.append((f"{name} has no effect with `{kind}`", f"Legal there: {', '.join(legal) or 'nothing'}."))
        elif isinstance(wanted, tuple):
            if value not in wanted:
                found.append((f"{name} is {value!r}", f"Legal are {', '.join(wanted)}."))
        elif isinstance(value, str) or value < 0 or (wanted is int and value != int(value)):
            number = "a whole number" if wanted is int else "a number"
            found.append((f"{name} is {value!r}", f"Give {number} of at least 0."))
    if kind == "cosine_with_min_lr" and ("min_lr" in given) == ("min_lr_rate" in given):
        found.append((f"holds {', '.join(given) or 'nothing'}", f"`{kind}` needs min_lr or min_lr_rate, one of them."))
    if kind == "warmup_stable_decay" and "num_decay_steps" not in given:
        found.append((f"holds {', '.join(given) or 'nothing'}", f"`{kind}` needs num_decay_steps."))
    end = given.get("lr_end", 1e-7)
    if kind == "polynomial" and not isinstance(end, str) and end >= settings.learning_rate:
        found.append((f"lr_end is {end}", f"It must be below learning_rate {settings.learning_rate}."))
    return found
