"""What each method cost: seconds and tokens of the stages behind it, bytes a user, seconds an answer. Pure functions.

`report.py` calls `costs_of` with what stages left behind: their markers, and the lines of metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Work:
    """What a stage took.

    Attributes:
        seconds: times the processes at work: a second on two ranks counts twice, and actors' seconds are added up.
        num_tokens: tokens run, padding left out; None where the stage did not count them.
        by_role: of a set of users' adapters where only needed users are trained: the part of the work that each use of
            them takes (`training.set_plan.Role`).
    """

    seconds: float
    num_tokens: int | None
    by_role: Mapping[str, Work] = field(default_factory=dict)

    def of(self, role: str) -> Work:
        """The part that a use takes; all of it where that is not told apart."""
        return self.by_role.get(role, self)


def work_of(stage: str, marker: Mapping[str, Any], events: Sequence[Event]) -> Work:
    """The work of a finished stage.

    Args:
        stage: its full name, as `group/proper`.
        marker: what its done.json says.
        events: all lines of metrics.jsonl.
    """
    units = {event["unit"]: event for event in events if "unit" in event and event.get("part") == stage}
    if units:  # actors: of a unit that was done twice, the last counts
        return _of_units(list(units.values()), float(marker["seconds"]))
    num_ranks, first = 1, 0
    steps = dict[int, tuple[float, int | None]]()  # rank-seconds and tokens of each line's steps
    for event in events:
        if event["stage"] == stage and event.get("event") == "begins":
            num_ranks, first = event["num_ranks"], event.get("from_step", 0)
        elif event["stage"] == stage and "step" in event:
            for step in [step for step in steps if step >= event["step"]]:
                del steps[step]  # steps that were repeated after a restart
            steps[event["step"]] = (_seconds_of(event) * num_ranks, event.get("num_tokens"))
    # the marker tells of the last attempt alone, which went on from a checkpoint if there was one
    before = sum(seconds for step, (seconds, _) in steps.items() if step <= first)
    tokens = _total([num for _, num in steps.values()]) if steps else None
    return Work(before + float(marker["seconds"]) * num_ranks, tokens)


def _of_units(units: Sequence[Event], marker_seconds: float) -> Work:
    seconds, tokens = (
        _total([unit.get("seconds") for unit in units]),
        _total([unit.get("num_tokens") for unit in units]),
    )
    if seconds is None:
        return Work(marker_seconds, tokens)
    shares = [(unit.get("shares", {}), unit) for unit in units if unit["seconds"]]
    by_role = {}
    for role in set.intersection(*({*own} for own, _ in shares)) if shares else ():
        part = sum(own[role] * unit["seconds"] for own, unit in shares)
        own_tokens = None if tokens is None else round(sum(own[role] * unit["num_tokens"] for own, unit in shares))
        by_role[role] = Work(part, own_tokens)
    return Work(seconds, tokens, by_role)


def _seconds_of(event: Event) -> float:
    """Wall seconds of the steps that a line of metrics sums up."""
    rate = event.get("tokens_per_s")
    return float(event["num_tokens"] / rate) if rate and event.get("num_tokens") else 0.0


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
    roles: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """By method `stages`, `train_seconds`, `train_tokens`, the `shared_` part of both, `bytes_per_user` and
    `predict_seconds` a question; None for what is not known.

    Args:
        behind: by method, the stages that had to be trained or computed for it.
        works: of the stages, where known.
        bytes_per_user: what is kept of each user to answer, by method.
        roles: what users' adapters are needed for, by method (`training.set_plan.Role`).
    """
    answering = answering_seconds(events)
    found = {}
    for method, stages in behind.items():
        role = (roles or {}).get(method, "")
        others = {name: other for name, other in behind.items() if name != method}

        def is_shared(stage: str, role: str = role, others: Mapping[str, Sequence[str]] = others) -> bool:
            """Whether another method needs the stage, too: where users are told apart, for the same users."""
            is_apart = stage in works and works[stage].by_role
            return any(
                stage in other and (not is_apart or _overlap(role, (roles or {}).get(name, "")))
                for name, other in others.items()
            )

        shared = [stage for stage in stages if is_shared(stage)]
        found[method] = {
            "stages": list(stages),
            "train_seconds": _seconds(stages, works, role),
            "shared_train_seconds": _seconds(shared, works, role),
            "train_tokens": _tokens(stages, works, role),
            "shared_train_tokens": _tokens(shared, works, role),
            "bytes_per_user": bytes_per_user.get(method),
            "predict_seconds": answering.get(method),
        }
    return found


def _overlap(one: str, other: str) -> bool:
    """Whether adapters for two uses are of the same people: nobody who is merged from is asked."""
    return (one == "merged") == (other == "merged")


def _seconds(stages: Sequence[str], works: Mapping[str, Work], role: str) -> float | None:
    found: float | None = _total([works[stage].of(role).seconds if stage in works else None for stage in stages])
    return found


def _tokens(stages: Sequence[str], works: Mapping[str, Work], role: str) -> int | None:
    found: int | None = _total([works[stage].of(role).num_tokens if stage in works else None for stage in stages])
    return found
