"""What each method cost: seconds and tokens of the stages behind it, bytes a user, seconds an answer. Pure functions.

`report.py` calls `costs_of` with what stages left behind: their markers, and the lines of metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Work:
    """What a stage took.

    Attributes:
        seconds: times the processes at work: a second on two ranks counts twice, and actors' seconds are added up.
        num_tokens: tokens run, padding left out; None where the stage did not count them.
    """

    seconds: float
    num_tokens: int | None


def work_of(stage: str, marker: Mapping[str, Any], events: Sequence[Event]) -> Work:
    """The work of a finished stage.

    Args:
        stage: its full name, as `group/proper`.
        marker: what its done.json says.
        events: all lines of metrics.jsonl.
    """
    units = {event["unit"]: event for event in events if "unit" in event and event.get("part") == stage}
    if units:  # actors: of a unit that was done twice, the last counts
        seconds = _total([event.get("seconds") for event in units.values()])
        return Work(
            float(marker["seconds"]) if seconds is None else seconds,
            _total([event.get("num_tokens") for event in units.values()]),
        )
    num_ranks, tokens = 1, dict[int, int | None]()
    for event in events:
        if event["stage"] == stage and event.get("event") == "begins":
            num_ranks = event["num_ranks"]
        elif event["stage"] == stage and "step" in event:
            for step in [step for step in tokens if step >= event["step"]]:
                del tokens[step]  # steps that were repeated after a restart
            tokens[event["step"]] = event.get("num_tokens")
    return Work(float(marker["seconds"]) * num_ranks, _total(list(tokens.values())) if tokens else None)


def _total(values: Sequence[Any]) -> Any:
    """Their sum, or None where one is not known."""
    return None if None in values else sum(values)


def answering_seconds(events: Sequence[Event]) -> dict[str, float]:
    """Seconds a question by method, of those that actors answered; reading, loading and merging are left out."""
    units: dict[tuple[str, str], Event] = {}
    for event in events:
        part = event.get("part") or ""
        if part.startswith("predictions/") and "answering_seconds" in event and event.get("num_questions"):
            units[part.removeprefix("predictions/"), event["unit"]] = event
    found = {}
    for method in dict.fromkeys(method for method, _ in units):
        own = [event for (name, _), event in units.items() if name == method]
        found[method] = sum(event["answering_seconds"] for event in own) / sum(event["num_questions"] for event in own)
    return found


def costs_of(
    behind: Mapping[str, Sequence[str]],
    works: Mapping[str, Work],
    bytes_per_user: Mapping[str, float | None],
    events: Sequence[Event],
) -> dict[str, dict[str, Any]]:
    """By method `stages`, `train_seconds`, `train_tokens`, the `shared_` part of both, `bytes_per_user` and
    `predict_seconds` a question; None for what is not known.

    Args:
        behind: by method, the stages that had to be trained or computed for it.
        works: of the stages, where known.
        bytes_per_user: what is kept of each user to answer, by method.
    """
    answering = answering_seconds(events)
    found = {}
    for method, stages in behind.items():
        shared = [s for s in stages if any(s in other for name, other in behind.items() if name != method)]
        found[method] = {
            "stages": list(stages),
            "train_seconds": _seconds(stages, works),
            "shared_train_seconds": _seconds(shared, works),
            "train_tokens": _tokens(stages, works),
            "shared_train_tokens": _tokens(shared, works),
            "bytes_per_user": bytes_per_user.get(method),
            "predict_seconds": answering.get(method),
        }
    return found


def _seconds(stages: Sequence[str], works: Mapping[str, Work]) -> float | None:
    found: float | None = _total([works[stage].seconds if stage in works else None for stage in stages])
    return found


def _tokens(stages: Sequence[str], works: Mapping[str, Work]) -> int | None:
    found: int | None = _total([works[stage].num_tokens if stage in works else None for stage in stages])
    return found
