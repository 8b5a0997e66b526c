"""What a person sees: the progress bar and the tables."""

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .goodput import Phase
from .record import Outcome, RequestRecord
from .report import MAX_LAG_P99_MS, Objective, Percentiles, Report
from .session import BenchResult, GoodputReport


class ProgressWatcher:
    """One bar a run."""

    def __init__(self, console: Console) -> None:
        name, failed = TextColumn("{task.description}"), TextColumn("{task.fields[failed]} failed")
        self.progress = Progress(name, BarColumn(), MofNCompleteColumn(), failed, TimeElapsedColumn(), console=console)
        self._task = self.progress.add_task("", visible=False, failed=0)
        self._failed = 0

    def begin(self, run: str, num_requests: int) -> None:
        self._failed = 0
        self._task = self.progress.add_task(run, total=num_requests, failed=0)

    def ended(self, record: RequestRecord) -> None:
        self._failed += record.outcome is not Outcome.OK
        self.progress.update(self._task, advance=1, failed=self._failed)


def print_result(console: Console, result: BenchResult) -> None:
    """One run in full; several as one row each."""
    workload = result.workload
    lengths = f"mean {workload.prompt_tokens_mean:.0f} + {workload.output_tokens_mean:.0f} tokens"
    console.print(f"[bold]{escape(result.model)}[/] at {result.url}: {workload.requests} requests of {escape(workload.source)}, {lengths}")
    if len(result.runs) == 1 and result.goodput is None:
        console.print(_latency_table(result.runs[0]))
        console.print(_run_table(result.runs[0], result.objective, result.gpus))
    else:
        console.print(_sweep_table(result.runs, result.objective))
    if result.goodput is not None:
        console.print(f"[bold]{goodput_text(result.goodput, result.gpus)}[/]")
    for warning in warnings(result.runs):
        console.print(warning, style="yellow", markup=False, highlight=False)


def _latency_table(report: Report) -> Table:
    table = Table("ms")
    for name in ("mean", "p50", "p90", "p95", "p99", "values"):
        table.add_column(name, justify="right")
    rows = {"TTFT": report.ttft_ms, "TPOT": report.tpot_ms, "inter-token": report.itl_ms, "E2E": report.e2e_ms}
    if report.refused_ms is not None:
        rows["refused after"] = report.refused_ms
    for name, values in (*rows.items(), ("client lag", report.lag_ms)):
        table.add_row(name, *_cells(values))
    return table


def _cells(values: Percentiles | None) -> list[str]:
    if values is None:
        return ["–"] * 6
    return [f"{value:.2f}" for value in (values.mean, values.p50, values.p90, values.p95, values.p99)] + [str(values.count)]


def _run_table(report: Report, objective: Objective, gpus: int) -> Table:
    table = Table(show_header=False)
    rates = (report.rate_asked, report.rate_sent, report.completed_per_s)
    table.add_row("requests/s asked, sent, completed", ", ".join(map(_number, rates)))
    table.add_row("tokens/s in, out", f"{report.prompt_tokens_per_s:.0f}, {report.output_tokens_per_s:.0f}")
    table.add_row("requests", ", ".join(f"{count} {kind}" for kind, count in report.outcomes.items() if count) or "none")
    table.add_row(f"met {_objective_text(objective)}", attainment_text(report))
    table.add_row(f"goodput, rate × attainment / {gpus} GPU", f"{_number(report.goodput_per_gpu)} requests/s")
    if report.cached_prompt_share is not None:
        table.add_row("prompt tokens from the server's cache", f"{report.cached_prompt_share:.1%}")
    return table


def _sweep_table(reports: list[Report], objective: Objective) -> Table:
    met = f"met {_objective_text(objective)}"
    table = Table("requests/s", "sent", "requests", "failed", met, "TTFT p50", "p99", "TPOT p50", "p99 (ms)")
    for report in reports:
        latencies = [f"{value:.1f}" if value is not None else "–" for value in (*_p50_p99(report.ttft_ms), *_p50_p99(report.tpot_ms))]
        rates = [_number(report.rate_asked), _number(report.rate_sent)]
        table.add_row(*rates, str(report.sent), str(report.failed), attainment_text(report), *latencies)
    return table


def _p50_p99(values: Percentiles | None) -> tuple[float | None, float | None]:
    return (None, None) if values is None else (values.p50, values.p99)


def goodput_text(goodput: GoodputReport, gpus: int) -> str:
    search, share = goodput.search, f"{goodput.target:.0%} of requests met both"
    if search.phase is Phase.BELOW:
        return f"no goodput found: not even at {search.decided[0].rate:.3g} requests/s {share}; start lower with --rate"
    found = {Phase.FOUND: "", Phase.ABOVE: "at least ", Phase.TOO_SHORT: "at least "}.get(search.phase, "(search not finished) at least ")
    figure = f"goodput {found}{goodput.per_gpu:.3g} requests/s/GPU: {search.rate:.3g} requests/s on {gpus} GPU, "
    if search.phase is Phase.TOO_SHORT:
        return (
            f"{figure}where {share}; the workload is too short to tell above that: "
            f"{2 * search.rate:.3g} requests/s for --probe-s takes {search.requests_needed} requests"
        )
    high = "∞" if search.rate_high is None else f"{search.rate_high:.3g}"
    return f"{figure}the highest rate at which {share}; surely between {search.rate_low:.3g} and {high}"


def warnings(reports: list[Report]) -> list[str]:
    """What makes the figures doubtful, and an example of each kind of failure."""
    texts = []
    for report in reports:
        at = f"at {_number(report.rate_asked)} requests/s: "
        if report.client_bound and report.lag_ms is not None:
            texts.append(f"{at}the client was late by {report.lag_ms.p99:.1f} ms (p99, over {MAX_LAG_P99_MS:.0f}): it is the bottleneck")
        if report.wrong_length:
            texts.append(f"{at}{report.wrong_length} answers of another length than asked, in spite of ignore_eos")
        if report.wrong_prompt_length:
            texts.append(f"{at}{report.wrong_prompt_length} prompts had another number of tokens for the server than they were made with")
        if report.interrupted:
            texts.append(f"{at}interrupted after {report.sent} of {report.planned} requests")
        texts += [f"{at}{kind}: {error[:300]}" for kind, error in report.first_errors.items()]
    return texts


def attainment_text(report: Report) -> str:
    attainment = report.attainment
    return f"{attainment.share:.1%} ({attainment.low:.1%} – {attainment.high:.1%})"


def _objective_text(objective: Objective) -> str:
    asked = [("TTFT", objective.ttft_ms), ("TPOT", objective.tpot_ms)]
    return " & ".join(f"{name} ≤ {limit:g} ms" for name, limit in asked if limit is not None) or "no objective"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
