"""The report's plots as SVG text: learning curves, gain by history length, how users spread over experts.

Those of experts while they train are in `gate_plots.py`.
"""

from __future__ import annotations

import io
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

COLOURS = {
    "own-habit": "#dadce0",
    "words": "#bdc1c6",
    "words+own": "#80868b",
    "base": "#9aa0a6",
    "base+RAG": "#5c6b73",
    "RAG": "#2e7d32",
    "RAG-recent": "#66bb6a",
    "RAG-random": "#a5d6a7",
    "PAG": "#827717",
    "PAG+RAG": "#c0ca33",
    "PPlug": "#6a1b9a",
    "PPlug+population": "#ab47bc",
    "PLoRA": "#00838f",
    "merged": "#4db6ac",
    "OPPU+RAG": "#1565c0",
    "OPPU+PAG": "#64b5f6",
    "proper+RAG": "#b71c1c",
    "proper+PAG": "#ef5350",
    "population": "#5f6368",
    "group": "#e69f00",
    "group-released": "#f0c36d",
    "OPPU": "#0072b2",
    "proper": "#d55e00",
    "proper-released": "#cc79a7",
    "proper-joint": "#56b4e9",
    "proper-user-gates": "#009e73",
    "proper-released-user-gates": "#7a4f9a",
}
"""Of the methods that most plots show; others are given one by `colour_of`."""


def colour_of(method: str) -> str:
    """A method's colour, the same in every plot."""
    place = sum(method.encode()) % 20  # not `hash`, which differs from process to process
    return COLOURS.get(method) or to_hex(plt.get_cmap("tab20")(place))


def svg_of(figure: Figure) -> str:
    """A figure as SVG text, without what comes before the element; the figure is closed."""
    out = io.StringIO()
    figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = out.getvalue()
    return text[text.index("<svg") :]


def learning_curves(events: list[dict[str, Any]]) -> str | None:
    """Loss by step of every stage that logged steps; the last run of each stage counts."""
    curves: dict[str, dict[int, float]] = {}
    for event in events:
        if event.get("loss") is not None and "step" in event:
            curve = curves.setdefault(event["stage"], {})
            for step in [s for s in curve if s >= event["step"]]:
                del curve[step]  # steps repeated after a restart
            curve[event["step"]] = event["loss"]
    if not curves:
        return None
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(curves) :]:
        axis.axis("off")
    for axis, (stage, curve) in zip(axes.flat, curves.items(), strict=False):
        axis.plot(list(curve), list(curve.values()), color="#0072b2", linewidth=1.5)
        axis.set_title(stage, fontsize=10)
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.set_ylabel("loss per target token", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    figure.tight_layout()
    return svg_of(figure)


def gain_by_history(task: dict[str, Any], metric: str, rival: str, methods: list[str]) -> str | None:
    """Each method's gain over `rival`, one of the references, by history length, with its interval where it has one."""
    buckets = task["by_history"]
    if not methods or not buckets:
        return None
    figure, axis = plt.subplots(figsize=(max(6, 1.7 * len(buckets) + 2), 3.2))
    width = 0.8 / len(methods)
    for n, method in enumerate(methods):
        found = [
            next(p for p in bucket["comparisons"][metric] if (p["method"], p["than"]) == (method, rival))
            for bucket in buckets
        ]
        gains = [pair["gain"] for pair in found]
        spans = [pair["interval"] or [pair["gain"], pair["gain"]] for pair in found]
        below = [max(0.0, gain - low) for gain, (low, _) in zip(gains, spans, strict=True)]
        above = [max(0.0, high - gain) for gain, (_, high) in zip(gains, spans, strict=True)]
        places = [i + (n - (len(methods) - 1) / 2) * width for i in range(len(buckets))]
        axis.bar(places, gains, width * 0.92, color=colour_of(method), label=method)
        axis.errorbar(places, gains, yerr=[below, above], fmt="none", ecolor="#333333", elinewidth=0.8, capsize=2)
    axis.axhline(0, color="#333333", linewidth=0.8)
    axis.set_xticks(range(len(buckets)), [f"{b['history']}\n({b['num_users']} users)" for b in buckets], fontsize=8)
    axis.set_xlabel("history items", fontsize=9)
    axis.set_ylabel(f"gain in {metric} over {rival}", fontsize=9)
    axis.tick_params(axis="y", labelsize=8)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.grid(axis="y", alpha=0.25)
    return svg_of(figure)


def expert_spread(experts: dict[str, Any]) -> str | None:
    """For each method with groups, the share of users whose strongest expert is this one, by module."""
    if not experts:
        return None
    columns = min(3, len(experts))
    rows = -(-len(experts) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.8 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(experts) :]:
        axis.axis("off")
    for axis, (method, found) in zip(axes.flat, experts.items(), strict=False):
        image = axis.imshow(found["dominant_share"], aspect="auto", cmap="viridis", vmin=0, vmax=1)
        axis.set_title(f"{method}\nmean largest gate {found['mean_largest_gate']:.2f}", fontsize=9)
        axis.set_xlabel("expert", fontsize=8)
        axis.set_ylabel("adapted module", fontsize=8)
        axis.set_xticks(range(found["num_experts"]))
        axis.tick_params(labelsize=7)
    figure.colorbar(image, ax=axes.ravel().tolist(), shrink=0.8).set_label("share of users", fontsize=8)
    return svg_of(figure)
