"""`python -m diptych.sim.compare`: the policies against each other on one virtual clock.

    python -m diptych.sim.compare --trace azure2023_conv.csv --workers 16 --rates 250,300,350,400 --ttft-ms 400 --tpot-ms 20

prints tables and, with --json and --png, writes the points and the curves. Without --trace: bursty arrivals (gamma, CV 5) of chat lengths,
or with --long Poisson arrivals of long prompts.
"""

import json
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from ..cluster.bench.command import in_a_folder
from ..cluster.bench.errors import WorkloadError
from ..cluster.bench.generator import Arrivals, Lengths, Recipe, generate
from ..cluster.bench.traces import read_trace
from ..cluster.bench.workload import Workload
from ..cluster.router.policy import Objectives
from ..cluster.router.registry import POLICIES
from .plot import plot_curves
from .settings import MACHINES
from .study import Case, Contender, Point, curve, goodput_of, lead

MAX_CONTEXT = 120_000
TABLE_WIDTH = 140
BURST = Recipe(1, Lengths(1155, 0.8, 8192), Lengths(211, 0.9, 2048), Arrivals.GAMMA, cv=5.0)
LONG = Recipe(1, Lengths(4000, 0.8, 12_000), Lengths(150, 0.8, 512))
DEFAULT_POLICIES = "round_robin,least_loaded,power_of_two,prefix_aware,goodput"

app = typer.Typer(add_completion=False)


@app.command()
def compare(
    workers: Annotated[int, typer.Option(min=2, help="Of one GPU each; half of them prefill in the split plants")] = 16,
    trace: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Azure, BurstGPT or Mooncake")] = None,
    long: Annotated[bool, typer.Option(help="Without a trace: long prompts instead of bursts")] = False,
    requests: Annotated[int, typer.Option(min=10, help="Of a stretch: the trace's first so many")] = 3000,
    skip: Annotated[int, typer.Option(min=0, help="But for so many before them")] = 0,
    stretches: Annotated[int, typer.Option(min=1, help="So many, spread over the trace, counted together")] = 1,
    warm_s: Annotated[float, typer.Option(min=0, help="What arrives before, in each stretch, is not counted")] = 2.0,
    rates: Annotated[str, typer.Option(help="Requests/s of the whole cluster, rising")] = "100,200,300,400",
    policies: Annotated[str, typer.Option(help=f"Of {', '.join(POLICIES)}")] = DEFAULT_POLICIES,
    plants: Annotated[str, typer.Option(help="split, colocated")] = "split,colocated",
    ttft_ms: Annotated[float, typer.Option(min=1)] = 400.0,
    tpot_ms: Annotated[float, typer.Option(min=1)] = 20.0,
    name: Annotated[str, typer.Option(help="In the table and the file; the trace's by default")] = "",
    decode_step_tokens: Annotated[int, typer.Option(min=1, help="Token budget of a decode worker's step")] = 2048,
    gateways: Annotated[int, typer.Option(min=1)] = 4,
    machine: Annotated[str, typer.Option(help=f"Of {', '.join(MACHINES)}")] = "vllm-h200",
    processes: Annotated[int, typer.Option(min=1)] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", callback=in_a_folder)] = None,
    png: Annotated[Path | None, typer.Option(callback=in_a_folder)] = None,
) -> None:
    """Attainment of each policy over rising rates, until it is hopeless, and its goodput."""
    console = Console(stderr=True, width=TABLE_WIDTH)
    if trace is not None and long:
        raise typer.BadParameter("--long is a workload of its own: leave out --trace or it")
    workloads = _stretches(trace, LONG if long else BURST, skip, requests, stretches)
    objectives, name = Objectives(ttft_ms / 1e3, tpot_ms / 1e3), name or (trace.name if trace else workloads[0].source)
    case = Case(name, workloads, objectives, _numbers(rates), warm_s)
    _require_counted(case)
    contenders = _contenders(workers, policies.split(","), plants.split(","))
    contenders = [replace(c, decode_step_tokens=decode_step_tokens, num_gateways=gateways, machine=_known(machine)) for c in contenders]
    with ProcessPoolExecutor(processes) as pool:
        curves = list(pool.map(_curve, [case] * len(contenders), contenders))
    for contender, points in zip(contenders, curves, strict=True):
        console.print(table(contender, points))
    if (beside := against_others(curves)).row_count:
        console.print(beside)
    if json_path is not None:
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode([point for points in curves for point in points])))
    if png is not None:
        plot_curves(png, curves, title=f"{case.name}: TTFT {ttft_ms:g} ms and TPOT {tpot_ms:g} ms, {workers} GPUs")
    found = {contender.name: msgspec.to_builtins(goodput_of(points)) for contender, points in zip(contenders, curves, strict=True)}
    print(json.dumps(found))


def table(contender: Contender, points: list[Point]) -> Table:
    goodput = goodput_of(points)
    shown = Table(title=f"{contender.name}: {goodput.rate:.0f} requests/s ({goodput.low:.0f} to {goodput.high:.0f})")
    for column in ("rate", "kept both", "95 %", "refused", "late TTFT", "late TPOT", "local", "TTFT p50/p90 ms", "TPOT p50/p90 ms"):
        shown.add_column(column, justify="right")
    for point in points:
        kept = point.attainment
        shares = [f"{share:.3f}" for share in (point.refused, point.late_ttft, point.late_tpot, point.local)]
        times = [f"{p50:.1f} / {p90:.1f}" for p50, p90 in (point.ttft_ms, point.tpot_ms)]
        shown.add_row(f"{point.rate:g}", f"{kept.share:.3f}", f"{kept.low:.3f} – {kept.high:.3f}", *shares, *times)
    return shown


def against_others(curves: list[list[Point]]) -> Table:
    """Goodput on each plant beside whichever other policy, on any plant, does best at the same rate."""
    shown = Table(title="goodput beside the best of the other policies, points in a hundred (95 %, batches in pairs)")
    for column in ("plant", "rate", "kept both", "the best other", "kept both", "ahead by"):
        shown.add_column(column)
    points = [point for each in curves for point in each]
    for ours in points:
        policy, _, plant = ours.contender.partition(", ")
        others = [each for each in points if each.rate == ours.rate and not each.contender.startswith("goodput")]
        if policy == "goodput" and others:
            best = max(others, key=lambda each: each.attainment.share)
            ahead = lead(ours, best)
            kept = [f"{each.attainment.share * 100:.1f}" for each in (ours, best)]
            by = f"{ahead.share * 100:+.1f} ({ahead.low * 100:+.1f} to {ahead.high * 100:+.1f})"
            shown.add_row(plant, f"{ours.rate:g}", kept[0], best.contender, kept[1], by)
    return shown


def _curve(case: Case, contender: Contender) -> list[Point]:
    return curve(case, contender, observe=lambda point: None)


def _stretches(trace: Path | None, recipe: Recipe, skip: int, requests: int, count: int) -> tuple[Workload, ...]:
    try:
        whole = generate(replace(recipe, num_requests=skip + count * requests)) if trace is None else read_trace(trace)
        if skip >= len(whole):
            raise typer.BadParameter(f"{whole.source} holds {len(whole)} requests: nothing is left after {skip}")
        if count > 1 and (held := (len(whole) - skip) // count) < requests:
            raise typer.BadParameter(f"{whole.source} holds {count} stretches of {held} requests, not of {requests}")
        starts = [skip + i * (len(whole) - skip) // count for i in range(count)]
        return tuple(whole.between(start, start + requests).fit_context(MAX_CONTEXT, scale=False) for start in starts)
    except WorkloadError as error:
        raise typer.BadParameter(str(error)) from None


def _known(machine: str) -> str:
    if machine not in MACHINES:
        raise typer.BadParameter(f"machine {machine}; known: {', '.join(MACHINES)}")
    return machine


def _contenders(workers: int, policies: list[str], plants: list[str]) -> list[Contender]:
    if unknown := set(policies) - set(POLICIES):
        raise typer.BadParameter(f"policy {', '.join(sorted(unknown))}; known: {', '.join(POLICIES)}")
    if unknown := set(plants) - {"split", "colocated"}:
        raise typer.BadParameter(f"plant {', '.join(sorted(unknown))}; known: split, colocated")
    sizes = {"split": (workers // 2, workers - workers // 2), "colocated": (0, workers)}
    return [Contender(*sizes[plant], policy) for plant in plants for policy in policies]


def _numbers(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(each) for each in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"rates must be numbers with commas between, not {text!r}") from None
    if not all(0 < rate < math.inf for rate in rates) or any(later <= rate for rate, later in pairwise(rates)):
        raise typer.BadParameter(f"rates must be positive, finite and rising, not {text!r}")
    return rates


def _require_counted(case: Case) -> None:
    """Of each stretch, at each rate: where nothing is counted nothing is kept, and that would pass for a result."""
    for rate in case.rates:
        for stretch in case.stretches:
            if (span_s := stretch.at_rate(rate).span_s) <= case.warm_s:
                text = f"at {rate:g}/s all of {len(stretch)} requests come within {span_s:.2f} s"
                raise typer.BadParameter(f"{text}, and are not counted before --warm-s, {case.warm_s:g} s")


if __name__ == "__main__":
    app()
