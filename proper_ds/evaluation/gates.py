"""What routers did with the experts while they trained, for the report: from the lines of metrics.jsonl."""

from __future__ import annotations

from typing import Any

_NO_END: dict[str, Any] = {"end": None, "likeness": None, "problems": []}


def gate_history(events: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By stage that mixes experts: `curve`, the numbers of `gate_numbers` with their `step`; and how it ended.

    `end` (the same numbers over more texts), `likeness` and `problems` are of the stage's end; None and empty where it
    has not come to it. The last run of a stage counts, and steps that were repeated after a restart count once.
    """
    found: dict[str, dict[str, Any]] = {}
    for event in events:
        if "gates" not in event:
            continue
        stage = found.setdefault(event["stage"], {"curve": []} | _NO_END)
        if "step" in event:
            stage["curve"] = [kept for kept in stage["curve"] if kept["step"] < event["step"]]
            stage["curve"].append({"step": event["step"]} | event["gates"])
            stage |= _NO_END
        elif event.get("event") == "experts":
            stage |= {"end": event["gates"], "likeness": event["likeness"], "problems": event["problems"]}
    return {name: stage for name, stage in found.items() if stage["curve"]}


def gate_rows(gates: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A row for each stage, as it ended; see `GATE_HEADER`."""
    rows = []
    for name, stage in gates.items():
        last, alike = stage["end"] or stage["curve"][-1], stage["likeness"]
        num = last["num_experts"]
        pair = f"{alike['max']:.3f} ({alike['most_alike'][0]}, {alike['most_alike'][1]})" if alike else ""
        rows.append(
            [
                name,
                f"{last['entropy']:.3f} of {last['highest_entropy']:.3f}",
                f"{last['num_effective']:.1f} of {num}",
                f"{last['num_used']:.1f}",
                f"{last['top_share']:.0%}",
                pair,
            ]
        )
    return rows


GATE_HEADER = [
    "stage",
    "entropy of the gates",
    "effective experts",
    "somebody's strongest",
    "users of the most liked",
    "most alike",
]


def jump_lines(report: dict[str, Any]) -> list[str]:
    """What exchanging the gates did to the loss, a line for each stage that does so."""
    lines = []
    for jump in report["router_jumps"]:
        before, after = jump["loss_user_gates"], jump["loss_lora_gates"]
        lines.append(
            f"{jump['stage']}: loss {before:.4f} under user-aware gates, {after:.4f} ({after - before:+.4f}) when they"
            " were exchanged for untrained LoRA-aware ones."
        )
    return lines


def problem_lines(report: dict[str, Any]) -> list[str]:
    """Warnings about gates and experts, with the stage's name."""
    return [f"{name}: {problem}" for name, stage in report["gates"].items() for problem in stage["problems"]]
