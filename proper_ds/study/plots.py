"""A study's plots as SVG text: quality against what it costs, by task."""

from __future__ import annotations

from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from proper_ds.evaluation.plots import colour_of, svg_of
from proper_ds.study.results import WHOLE

_COLUMNS = 3


def quality_against(results: dict[str, Any], cost: str, label: str) -> str | None:
    """Each method's score over a cost, a panel for each task; those that nothing cheaper beats are joined and named."""
    panels = {name: _points(results, name, cost) for name in results["columns"]}
    panels = {name: points for name, points in panels.items() if len(points) > 1}
    if not panels:
        return None
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.6 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, points) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, points, results["columns"][name]["higher_is_better"])
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(label, fontsize=8)
        axis.set_ylabel(results["columns"][name]["metric"], fontsize=8)
    methods = dict.fromkeys(method for points in panels.values() for method in points)
    marks = [plt.Line2D([], [], marker="o", linestyle="", color=colour_of(method), label=method) for method in methods]
    figure.legend(handles=marks, fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    return svg_of(figure)


def _points(results: dict[str, Any], name: str, cost: str) -> dict[str, tuple[float, float]]:
    """(cost, score) by method, of those whose cost is known."""
    cells = results["methods"][WHOLE]
    costs = {method: by_column.get(name, {}).get(cost) for method, by_column in results["costs"].items()}
    return {
        method: (price, cells[method][name]["value"])
        for method, price in costs.items()
        if price is not None and name in cells.get(method, {})
    }


def unbeaten(points: dict[str, tuple[float, float]], higher_is_better: bool) -> list[str]:
    """Methods that no other beats at the same or a lower cost, the cheapest first."""
    sign = 1 if higher_is_better else -1
    found: list[str] = []
    for method in sorted(points, key=lambda name: (points[name][0], -sign * points[name][1])):
        if not found or sign * points[method][1] > sign * points[found[-1]][1]:
            found.append(method)
    return found


def _panel(axis: Axes, points: dict[str, tuple[float, float]], higher_is_better: bool) -> None:
    front = unbeaten(points, higher_is_better)
    axis.plot(*zip(*(points[method] for method in front), strict=True), color="#bdc1c6", linewidth=1, zorder=1)
    for method, (price, value) in points.items():
        axis.scatter(price, value, color=colour_of(method), s=28, zorder=2)
    for method in front:
        axis.annotate(method, points[method], fontsize=7, xytext=(3, 4), textcoords="offset points")
    axis.set_xscale("symlog", linthresh=max(1.0, min((p for p, _ in points.values() if p > 0), default=1.0)))
    if not higher_is_better:
        axis.invert_yaxis()
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25)
