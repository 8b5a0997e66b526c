"""`diptych bench transfer`: KV pages between two processes of this machine, over every transport that there is.

    paths (shm, ucx, nvlink, NIXL) ─► per page size: one page, one call, a burst of calls ─► nvlink: the cost to work beside it

Pages are scattered on both sides. Time runs from the call of the public `write_pages` until the receiver, a process of its own that looks
at its counter without a pause, has seen all pages. Paths take turns and never run at the same time.
"""

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from uuid import uuid4

import numpy as np
import torch
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from ...kvtransfer.selection import KINDS
from ...kvtransfer.transport import IdArray
from ...messages.errors import ClusterError
from . import transfer_nixl
from .errors import TransferBenchError
from .transfer_load import PREFILL_KV_BYTES
from .transfer_peer import Path, Remote, remote

CASES = [(4 << 10, 4096), (32 << 10, 2048), (64 << 10, 2048), (256 << 10, 1024)]        # page bytes, pages of a call
QUICK_SHARE = 16
BURST = 16
ROUNDS, LATENCIES = 7, 200
QUICK_ROUNDS, QUICK_LATENCIES = 3, 20
LOAD_CASE = (64 << 10, 2048)
LOAD_ROUNDS = 5
PREFILL_LAYERS, DECODE_STEPS = 64, 60
FLOODING_WRITES = 8             # of LOAD_CASE, which last longer than one piece of work beside them


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

    @property
    def slow_down(self) -> float:
        return self.beside_ms / self.alone_ms - 1


class TransferReport(Struct, frozen=True):
    machine: str
    versions: str
    rows: list[TransferRow]
    loads: list[LoadRow]
    skipped: dict[str, str]         # transport → why


@dataclass(frozen=True)
class TransferBench:
    transports: tuple[str, ...]     # none named: all that can be used
    programs: tuple[int, ...]       # nvlink: one path each; none: the default alone
    copy_engines: bool              # nvlink: a path of theirs too
    one_gpu: bool                   # both ends on the first GPU: no link, a dry run
    quick: bool

    @property
    def cases(self) -> list[tuple[int, int]]:
        share = QUICK_SHARE if self.quick else 1
        return [(page_bytes, num_pages // share) for page_bytes, num_pages in CASES]


def run_transfer_bench(bench: TransferBench, console: Console) -> TransferReport:
    """Raises TransferBenchError, ClusterError and the transports' own errors."""
    paths, skipped = choose_paths(bench, torch.cuda.device_count())
    for name, reason in skipped.items():
        console.print(f"{name} not measured: {reason}", style="yellow", highlight=False)
    rows: list[TransferRow] = []
    loads: list[LoadRow] = []
    for path in paths:
        with _pair(path, bench.one_gpu) as pair:
            for case in bench.cases:
                rows.append(pair.row(*case, bench.quick))
                console.print(f"{path.name}, {rows[-1].page_bytes >> 10} KiB: {rows[-1].call_gbps:.2f} GB/s", style="dim", highlight=False)
            if path.transport == "nvlink":
                loads += pair.loads()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report = TransferReport(", ".join(devices) or "CPU", _versions(), rows, loads, skipped)
    _print(report, console)
    return report


def choose_paths(bench: TransferBench, num_gpus: int) -> tuple[list[Path], dict[str, str]]:
    """What to measure, and why not the rest. Raises TransferBenchError for a transport that was named and cannot be used."""
    unknown = set(bench.transports) - set(KINDS) - {"nixl"}
    if unknown:
        raise TransferBenchError(f"no transport {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}, nixl")
    skipped = {name: reason for name in (*KINDS, "nixl") if (reason := _why_not(name, num_gpus, bench.one_gpu))}
    wanted = bench.transports or tuple(name for name in (*KINDS, "nixl") if name not in skipped)
    impossible = [f"{name}: {skipped[name]}" for name in wanted if name in skipped]
    if impossible:
        raise TransferBenchError("; ".join(impossible))
    paths = [path for name in wanted for path in _paths_of(name, bench, num_gpus)]
    return paths, {} if bench.transports else skipped


def _paths_of(name: str, bench: TransferBench, num_gpus: int) -> Iterator[Path]:
    if name == "nvlink":
        for programs in bench.programs or (0,):
            yield Path(f"nvlink, {programs} programs" if programs else name, name, "cuda", programs)
        if bench.copy_engines:
            yield Path("nvlink, copy engines", name, "cuda", copy_engines=True)
    else:
        yield Path(name, name, "cpu")
        if name == "nixl" and (num_gpus >= 2 or (bench.one_gpu and num_gpus)):
            yield Path("nixl, GPU memory", name, "cuda")


def _why_not(name: str, num_gpus: int, one_gpu: bool) -> str | None:
    if name == "nvlink":
        needed = 1 if one_gpu else 2
        return None if num_gpus >= needed else f"{num_gpus} GPUs, it needs {needed}"
    if name == "nixl":
        return None if transfer_nixl.is_installed() else "not installed (nixl-cu13 or nixl-cu12)"
    if name == "ucx":
        from ...kvtransfer.ucx.provider import find_libucp

        try:
            find_libucp()
        except ClusterError as error:
            return str(error)
    return None


class Pair:
    def __init__(self, path: Path, writer: Remote, receiver: Remote) -> None:
        self._path, self._writer, self._receiver = path, writer, receiver

    def row(self, page_bytes: int, num_pages: int, quick: bool) -> TransferRow:
        self._open(page_bytes, num_pages)
        rounds, latencies = (QUICK_ROUNDS, QUICK_LATENCIES) if quick else (ROUNDS, LATENCIES)
        here, there = _shuffled(num_pages, 1), _shuffled(num_pages, 2)
        self._writer.call("prepare", here[:1], there[:1])
        pages = self._measure(1, 1, latencies)
        self._writer.call("prepare", here, there)
        calls, bursts = self._measure(num_pages, 1, rounds), self._measure(num_pages, BURST, rounds)
        num_bytes = page_bytes * num_pages
        busy_s = calls.median(lambda each: each.busy_s)
        accounts = self._path.transport != "nixl"
        return TransferRow(
            path=self._path.name,
            page_bytes=page_bytes,
            num_pages=num_pages,
            call_gbps=num_bytes / calls.median(lambda each: each.counted_s) / 1e9,
            burst_gbps=BURST * num_bytes / bursts.median(lambda each: each.counted_s) / 1e9,
            busy_gbps=num_bytes / busy_s / 1e9 if accounts else None,
            page_us=1e6 * pages.median(lambda each: each.counted_s),
            page_p99_us=1e6 * float(np.quantile([each.counted_s for each in pages.rounds], 0.99)),
            page_call_us=1e6 * pages.median(lambda each: each.returned_s),
            page_busy_us=1e6 * pages.median(lambda each: each.busy_s) if accounts else None,
            call_us=1e6 * calls.median(lambda each: each.counted_s),
            call_call_us=1e6 * calls.median(lambda each: each.returned_s),
            burst_call_us=1e6 * bursts.median(lambda each: each.returned_s) / BURST,
        )

    def _open(self, page_bytes: int, num_pages: int) -> None:
        self._receiver.tell("open", page_bytes, num_pages)
        self._writer.call("open", page_bytes, num_pages)
        self._writer.call("connect", self._receiver.answer())

    def _measure(self, num_pages: int, num_calls: int, rounds: int) -> "_Rounds":
        return _Rounds([self._once(num_pages, num_calls) for _ in range(rounds + 2)][2:])

    def _once(self, num_pages: int, num_calls: int) -> "_Round":
        self._receiver.call("reset")
        self._receiver.tell("counted_at", num_pages * num_calls)
        written = self._writer.call("write", num_calls)
        counted_at = self._receiver.answer()
        busy_s = self._writer.call("stop")
        return _Round(written.returned_s - written.started_s, counted_at - written.started_s, busy_s)

    def loads(self) -> list[LoadRow]:
        """A prefill's products, its KV leaving after each layer, or a flood; a decode's copies while a flood arrives."""
        page_bytes, num_pages = LOAD_CASE
        self._open(page_bytes, num_pages)
        here, there = _shuffled(num_pages, 1), _shuffled(num_pages, 2)
        of_a_layer = PREFILL_KV_BYTES // page_bytes
        self._writer.call("prepare", here[:of_a_layer], there[:of_a_layer])
        ours = self._beside_own("sender: prefill that sends its KV", 1, in_order=True)
        self._writer.call("prepare", here, there)
        flooded = self._beside_own("sender: prefill, pages without a pause", FLOODING_WRITES, in_order=False)
        return [ours, flooded, self._beside_arriving()]

    def _beside_own(self, work: str, num_writes: int, in_order: bool) -> LoadRow:
        alone, beside = [], []
        for _ in range(LOAD_ROUNDS):
            alone.append(self._writer.call("compute", "prefill", PREFILL_LAYERS, 0, in_order))
            beside.append(self._writer.call("compute", "prefill", PREFILL_LAYERS, num_writes, in_order))
        return LoadRow(self._path.name, work, statistics.median(alone), statistics.median(beside))

    def _beside_arriving(self) -> LoadRow:
        alone, beside = [], []
        for _ in range(LOAD_ROUNDS):
            alone.append(self._receiver.call("compute", "decode", DECODE_STEPS, 0, False))
            self._writer.call("write", FLOODING_WRITES * DECODE_STEPS // 4)
            beside.append(self._receiver.call("compute", "decode", DECODE_STEPS, 0, False))
            self._writer.call("stop")
        return LoadRow(self._path.name, "receiver: decode's copies while pages arrive", statistics.median(alone), statistics.median(beside))


@dataclass(frozen=True)
class _Round:
    returned_s: float           # after the start: the last call
    counted_s: float
    busy_s: float


@dataclass(frozen=True)
class _Rounds:
    rounds: list[_Round]

    def median(self, of: Callable[[_Round], float]) -> float:
        return statistics.median(map(of, self.rounds))


@contextmanager
def _pair(path: Path, one_gpu: bool) -> Iterator[Pair]:
    cluster = f"bench{uuid4().hex[:8]}"
    gpus = _gpus(one_gpu) if path.device == "cuda" else (None, None)
    with remote(path, cluster, "writer", gpus[0]) as writer, remote(path, cluster, "receiver", gpus[1]) as receiver:
        yield Pair(path, writer, receiver)


def _gpus(one_gpu: bool) -> tuple[str, str]:
    """What each end sees, in the words of CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else ["0", "1"]
    return names[0], names[0 if one_gpu else 1]


def _shuffled(num_pages: int, seed: int) -> IdArray:
    return np.random.default_rng(seed).permutation(num_pages)


def _versions() -> str:
    found = []
    for name in ("torch", "triton", "libucx-cu12", "libucx-cu13", "nixl-cu12", "nixl-cu13"):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def _print(report: TransferReport, console: Console) -> None:
    console.print(f"{report.machine}, {report.versions}", highlight=False)
    table = Table("path", "page", "pages", "one call", f"burst of {BURST}", "moving", "one page, µs", "p99", title="GB/s and latency")
    columns = "one page: returned", "moving", "counted", "one call: returned", "counted", "burst: returned"
    split = Table("path", "page", *columns, title="µs from the call on")
    for row in report.rows:
        page = f"{row.page_bytes >> 10} KiB"
        busy = "" if row.busy_gbps is None else f"{row.busy_gbps:.2f}"
        speeds = f"{row.call_gbps:.2f}", f"{row.burst_gbps:.2f}", busy
        table.add_row(row.path, page, str(row.num_pages), *speeds, f"{row.page_us:.0f}", f"{row.page_p99_us:.0f}")
        moving = "" if row.page_busy_us is None else f"{row.page_busy_us:.0f}"
        whole = f"{row.call_call_us:.0f}", f"{row.call_us:.0f}", f"{row.burst_call_us:.0f}"
        split.add_row(row.path, page, f"{row.page_call_us:.0f}", moving, f"{row.page_us:.0f}", *whole)
    console.print(table, split)
    if report.loads:
        loads = Table("path", "work", "alone, ms", "beside pages, ms", "slower by")
        for load in report.loads:
            loads.add_row(load.path, load.work, f"{load.alone_ms:.3f}", f"{load.beside_ms:.3f}", f"{load.slow_down:.1%}")
        console.print(loads)
