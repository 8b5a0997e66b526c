"""Reports as PNG: attainment over rate (points with their 95 % intervals, the target line, the rate found), and an engine's rows."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .engine_rows import EngineReport
from .report import Report


def plot_attainment(path: Path, reports: Sequence[Report], *, title: str, target: float, goodput: float | None = None) -> None:
    """Draws without a display; raises OSError where `path` cannot be written."""
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    measured = [(report.rate_sent, report.attainment) for report in reports if report.rate_sent is not None]
    points = sorted(measured, key=lambda point: point[0])
    rates, shares = [rate for rate, _ in points], [attainment.share for _, attainment in points]
    below = [attainment.share - attainment.low for _, attainment in points]
    above = [attainment.high - attainment.share for _, attainment in points]
    axes.errorbar(rates, shares, yerr=[below, above], marker="o", capsize=3, label="met TTFT and TPOT (95 % interval)")
    axes.axhline(target, color="grey", linestyle="--", label=f"target {target:g}")
    if goodput:
        axes.axvline(goodput, color="tab:green", linestyle=":", label=f"found {goodput:.3g} requests/s")
    axes.set(xlabel="requests per second sent", ylabel="attainment", ylim=(-0.02, 1.02), title=title)
    axes.set_xlim(left=0)
    axes.legend(loc="lower left")
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png")


def plot_rows(path: Path, report: EngineReport) -> None:
    """One bar a row: its time, and as a darker part of it the roofline's."""
    figure = Figure(figsize=(8, 0.34 * len(report.rows) + 1.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [f"{row.kind} {row.shape}" for row in report.rows]
    axes.barh(names, [row.ms for row in report.rows], color="lightsteelblue", label="measured")
    axes.barh(names, [row.floor_ms for row in report.rows], color="steelblue", label="roofline")
    axes.set(xscale="log", xlabel="ms", title=f"{report.model}, {report.device}")
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, format="png")
