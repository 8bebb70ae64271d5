"""Plots of KL along chains of the demo model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.quality.cells import CURVE_STEP
from benchmarks.quality.methods import METHODS
from benchmarks.quality.summary import Result
from benchmarks.quality.tables import Report, name
from recipes.metrics import mean_and_stderr


def _most_chains(found: Iterable[Result]) -> str:
    return max(found, key=lambda result: len(result.problems)).level


def plot_curves(report: Report, path: Path) -> None:
    """KL over generated tokens at the level with most chains, 4/4, 4/2 and 2/2 side by side."""
    from matplotlib.figure import Figure

    shown = report.shown("demo", "forced")
    level = _most_chains(shown.values())
    methods = [*dict.fromkeys(key[0] for key in shown)]
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    lines: dict[str, Any] = {}
    for axis, bits in zip(axes, ((4, 4), (4, 2), (2, 2)), strict=True):
        for (method, *widths, at_level), result in shown.items():
            if tuple(widths) != bits or at_level != level:
                continue
            points = [
                (CURVE_STEP * i, point)
                for i, point in enumerate(result.kl_curve)
                if point is not None
            ]
            color = f"C{methods.index(method) % 10}"
            (lines[method],) = axis.plot(
                *zip(*points, strict=True), marker="o", markersize=3, color=color
            )
        title = f"{bits[0]}/{bits[1]} bits, {level}"
        axis.set(yscale="log", xlabel="generated tokens", title=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("KL(bf16 || method), nats")
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


def plot_storage(report: Report, path: Path) -> None:
    """KL against bits per element at the level with most chains, every method and bit width."""
    from matplotlib.figure import Figure

    picked = report.pick("demo", "forced")
    level = _most_chains(picked.values())
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axis = figure.subplots()
    for method in METHODS:
        points = [
            (result.bits_per_element, mean_and_stderr(result.kl)[0], name(result).split()[1])
            for key, result in picked.items()
            if key[0] == method and key[3] == level and method != "bf16"
        ]
        if points:
            x, y, labels = zip(*points, strict=True)
            axis.plot(x, y, marker="o", label=method)
            for at, label in zip(zip(x, y, strict=True), labels, strict=True):
                axis.annotate(label, at, fontsize=7, xytext=(3, 3), textcoords="offset points")
    axis.set(
        yscale="log",
        xlabel="bits per element, all in, one branch on its own",
        ylabel="KL(bf16 || method), nats",
    )
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
