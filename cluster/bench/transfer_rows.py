"""What `bench transfer` reports: one row a path and page size, and on GPUs what work beside it loses."""

from msgspec import Struct
from rich.console import Console
from rich.table import Table

BURST = 16                    # calls


class TransferRow(Struct, frozen=True):
    path: str
    page_bytes: int
    num_pages: int            # of a call
    call_gbps: float          # one call at a time; this and the other figures are medians unless they say otherwise
    burst_gbps: float         # BURST calls in a row
    busy_gbps: float | None   # one call, over the time that the transport itself counts (nvlink: between events of its stream)
    page_us: float            # one page, from the call until it is counted
    page_p99_us: float
    page_call_us: float       # of that: until `write_pages` returned
    page_busy_us: float | None      # of that: moving, as the transport counts
    call_us: float            # one whole call, until all is counted
    call_call_us: float
    burst_call_us: float      # until a call of a burst returned, mean: the host without pauses


class LoadRow(Struct, frozen=True):
    path: str
    work: str
    alone_ms: float           # one piece of work, median
    beside_ms: float          # the same while pages flow
    gbps: float               # at which they do

    @property
    def slow_down(self) -> float:
        return self.beside_ms / self.alone_ms - 1


class HandoffStep(Struct, frozen=True):
    name: str
    p50_us: float
    p99_us: float


class HandoffRow(Struct, frozen=True):
    """Of one block: offer to commit."""

    path: str
    page_bytes: int
    pause_s: float            # before each
    count: int
    p50_us: float
    p99_us: float
    steps: list[HandoffStep]        # in order; what they take together is the whole
    idle_cpu: float                 # cores that both workers take together while they wait


class TransferReport(Struct, frozen=True):
    machine: str
    versions: str
    skipped: dict[str, str]         # transport → why
    rows: list[TransferRow] = []
    handoffs: list[HandoffRow] = []
    loads: list[LoadRow] = []


def print_report(report: TransferReport, console: Console) -> None:
    console.print(f"{report.machine}, {report.versions}", highlight=False)
    if report.rows:
        _print_pages(report.rows, console)
    for row in report.handoffs:
        _print_handoff(row, console)
    if report.loads:
        loads = Table("path", "work", "alone, ms", "beside pages, ms", "slower by", "GB/s")
        for load in report.loads:
            times = f"{load.alone_ms:.3f}", f"{load.beside_ms:.3f}", f"{load.slow_down:.1%}"
            loads.add_row(load.path, load.work, *times, f"{load.gbps:.1f}")
        console.print(loads)


def _print_handoff(row: HandoffRow, console: Console) -> None:
    when = f"{row.count} times, each after {1e3 * row.pause_s:g} ms"
    title = f"handoff of one block over {row.path}, µs, {when}; idle, both workers take {row.idle_cpu:.1%} of a core"
    table = Table("", "p50", "p99", title=title)
    for step in row.steps:
        table.add_row(step.name, f"{step.p50_us:.0f}", f"{step.p99_us:.0f}")
    table.add_row("offer to commit", f"{row.p50_us:.0f}", f"{row.p99_us:.0f}", style="bold")
    console.print(table)


def _print_pages(rows: list[TransferRow], console: Console) -> None:
    table = Table("path", "page", "pages", "one call", f"burst of {BURST}", "moving", "one page, µs", "p99", title="GB/s and latency")
    columns = "one page: returned", "moving", "counted", "one call: returned", "counted", "burst: returned"
    split = Table("path", "page", *columns, title="µs from the call on")
    for row in rows:
        page = f"{row.page_bytes >> 10} KiB"
        busy = "" if row.busy_gbps is None else f"{row.busy_gbps:.2f}"
        speeds = f"{row.call_gbps:.2f}", f"{row.burst_gbps:.2f}", busy
        table.add_row(row.path, page, str(row.num_pages), *speeds, f"{row.page_us:.0f}", f"{row.page_p99_us:.0f}")
        moving = "" if row.page_busy_us is None else f"{row.page_busy_us:.0f}"
        whole = f"{row.call_call_us:.0f}", f"{row.call_us:.0f}", f"{row.burst_call_us:.0f}"
        split.add_row(row.path, page, f"{row.page_call_us:.0f}", moving, f"{row.page_us:.0f}", *whole)
    console.print(table, split)
