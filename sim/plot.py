"""Attainment over rate, one line for each contender, as a PNG."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .study import TARGET, Point


def plot_curves(path: Path, curves: Sequence[Sequence[Point]], *, title: str) -> None:
    """Split plants are drawn solid, colocated ones dashed; a policy keeps its colour. Raises OSError where `path` cannot be written."""
    figure = Figure(figsize=(7.5, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    policies = list(dict.fromkeys(points[0].contender.split(",")[0] for points in curves if points))
    for points in curves:
        policy, _, plant = points[0].contender.partition(",")
        rates, shares = [point.rate for point in points], [point.attainment.share for point in points]
        below = [point.attainment.share - point.attainment.low for point in points]
        above = [point.attainment.high - point.attainment.share for point in points]
        axes.errorbar(
            rates,
            shares,
            yerr=[below, above],
            capsize=2,
            marker="o",
            markersize=3,
            color=f"C{policies.index(policy)}",
            linestyle="--" if "colocated" in plant else "-",
            linewidth=2 if policy == "goodput" else 1,
            label=points[0].contender,
        )
    axes.axhline(TARGET, color="grey", linestyle=":")
    axes.set(xlabel="requests per second of the whole cluster", ylabel="kept both promises", ylim=(-0.02, 1.02), title=title)
    axes.legend(fontsize=7, loc="lower left")
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png")
