"""The report's plots of routers and experts while they train, as SVG text."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from proper_ds.evaluation.plots import svg_of

_MAX_STEPS = 200


def gate_curves(gates: dict[str, dict[str, Any]]) -> str | None:
    """For each stage of `gate_history`: sharpness and evenness of the gates, users by expert, likeness of experts."""
    if not gates:
        return None
    figure, axes = plt.subplots(
        len(gates), 3, figsize=(12, 2.8 * len(gates)), squeeze=False, layout="constrained", width_ratios=[4, 4, 3]
    )
    for (name, stage), row in zip(gates.items(), axes, strict=True):
        curve = stage["curve"][:: max(1, -(-len(stage["curve"]) // _MAX_STEPS))]
        _levels(row[0], name, curve)
        _shares(row[1], curve)
        _likeness(row[2], stage["likeness"])
        for axis in row:
            axis.tick_params(labelsize=7)
    return svg_of(figure)


def _levels(axis: Axes, name: str, curve: list[dict[str, Any]]) -> None:
    num = curve[0]["num_experts"]
    steps = [point["step"] for point in curve]
    lines = {
        "entropy / highest": [point["entropy"] / max(point["highest_entropy"], 1e-9) for point in curve],
        "effective experts / N": [point["num_effective"] / num for point in curve],
        "users of the most liked expert": [point["top_share"] for point in curve],
    }
    for (label, values), colour in zip(lines.items(), ("#0072b2", "#009e73", "#d55e00"), strict=True):
        axis.plot(steps, values, label=label, color=colour, linewidth=1.5)
    axis.set_ylim(0, 1.05)
    axis.set_title(f"{name}, {num} experts", fontsize=9)
    axis.set_xlabel("optimizer step", fontsize=8)
    axis.legend(fontsize=7, frameon=False, loc="lower left")
    axis.grid(alpha=0.25)


def _shares(axis: Axes, curve: list[dict[str, Any]]) -> None:
    by_rank = "user_share_by_rank" in curve[0]
    shares_NS = np.asarray([point["user_share_by_rank" if by_rank else "user_share"] for point in curve]).T
    edges = np.linspace(0, 1, shares_NS.shape[1] + 1)
    image = axis.pcolormesh(
        edges, np.arange(len(shares_NS) + 1) - 0.5, shares_NS, cmap="viridis", vmin=0, vmax=max(shares_NS.max(), 1e-9)
    )
    axis.set_xticks([0, 1], [str(curve[0]["step"]), str(curve[-1]["step"])])
    axis.set_xlabel("optimizer step", fontsize=8)
    axis.set_ylabel("experts by falling share" if by_rank else "expert", fontsize=8)
    axis.set_title("share of users by strongest expert", fontsize=9)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.figure.colorbar(image, ax=axis, shrink=0.8).ax.tick_params(labelsize=7)


def _likeness(axis: Axes, likeness: dict[str, Any] | None) -> None:
    if likeness is None:
        axis.axis("off")
        return
    image = axis.imshow(likeness["cosine"], cmap="RdBu_r", vmin=-1, vmax=1)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(integer=True))
    axis.set_title(f"likeness of experts, mean {likeness['mean']:.2f}", fontsize=9)
    axis.set_xlabel("expert", fontsize=8)
    axis.figure.colorbar(image, ax=axis, shrink=0.8).ax.tick_params(labelsize=7)
