"""`diptych bench transfer`: KV pages between two processes of this machine, over every transport that there is.

    paths (shm, ucx, nvlink, NIXL) ─► pages:   per page size one page, one call, a burst of calls; nvlink: the cost to work beside it
                                      handoff: of one block, by production workers (handoff_bench.py)
                                      decode:  steps of a model while pages arrive beside them (decode_load.py)

Pages are scattered on both sides. Time runs from the call of the public `write_pages` until the receiver, a process of its own that looks
at its counter without a pause, has seen all pages. Paths take turns and never run at the same time.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from uuid import uuid4

import numpy as np
import torch
from rich.console import Console

from ...kvtransfer.selection import KINDS
from ...kvtransfer.transport import IdArray
from ...kvtransfer.ucx import provider
from ...messages.errors import ClusterError
from . import transfer_nixl
from .decode_load import decode_rows
from .errors import TransferBenchError
from .handoff_bench import handoff_rows
from .transfer_load import PREFILL_KV_BYTES
from .transfer_peer import Path, Remote, remote
from .transfer_rows import BURST, LoadRow, TransferReport, TransferRow, print_report

CASES = [(4 << 10, 4096), (32 << 10, 2048), (64 << 10, 2048), (256 << 10, 1024)]        # page bytes, pages of a call
QUICK_SHARE = 16
ROUNDS, LATENCIES = 7, 200
QUICK_ROUNDS, QUICK_LATENCIES = 3, 20
LOAD_CASE = (64 << 10, 2048)
LOAD_ROUNDS = 5
PREFILL_LAYERS, DECODE_STEPS = 64, 60
PART_NAMES = ("pages", "handoff", "decode")
EITHER_MEMORY = ("ucx", "nixl")         # host memory, and where there are GPUs theirs
FLOODING_WRITES = 5             # of LOAD_CASE, which last longer than one piece of work beside them


@dataclass(frozen=True)
class TransferBench:
    transports: tuple[str, ...]     # none named: all that can be used
    programs: tuple[int, ...]       # nvlink: one path each; none: the default alone
    copy_engines: bool              # nvlink: a path of theirs too
    one_gpu: bool                   # both ends on the first GPU: no link, a dry run
    quick: bool
    parts: tuple[str, ...] = PART_NAMES

    @property
    def cases(self) -> list[tuple[int, int]]:
        share = QUICK_SHARE if self.quick else 1
        return [(page_bytes, num_pages // share) for page_bytes, num_pages in CASES]


def run_transfer_bench(bench: TransferBench, console: Console) -> TransferReport:
    """Raises TransferBenchError, ClusterError and the transports' own errors."""
    paths, skipped = choose_paths(bench, torch.cuda.device_count())
    for name, reason in skipped.items():
        console.print(f"{name} not measured: {reason}", style="yellow", highlight=False)
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report = TransferReport(", ".join(devices) or "CPU", _versions(), skipped=skipped)
    for path in paths:
        if "pages" in bench.parts:
            _measure_pages(path, bench, report, console)
        if path.transport != "nixl" and not (path.programs or path.copy_engines):  # the others as deployments have them
            gpus = _gpus_of(path, bench.one_gpu)
            if "handoff" in bench.parts:
                report.handoffs.extend(handoff_rows(path, gpus, bench.quick))
            if "decode" in bench.parts:
                report.loads.extend(decode_rows(path, gpus, bench.quick))
    print_report(report, console)
    return report


def _measure_pages(path: Path, bench: TransferBench, report: TransferReport, console: Console) -> None:
    with _pair(path, bench.one_gpu) as pair:
        for case in bench.cases:
            row = pair.row(*case, bench.quick)
            report.rows.append(row)
            console.print(f"{path.name}, {row.page_bytes >> 10} KiB: {row.call_gbps:.2f} GB/s", style="dim", highlight=False)
        if path.transport == "nvlink":
            report.loads.extend(pair.loads())


def choose_paths(bench: TransferBench, num_gpus: int) -> tuple[list[Path], dict[str, str]]:
    """What to measure, and why not the rest. Raises TransferBenchError for a transport that was named and cannot be used."""
    unknown = set(bench.transports) - set(KINDS) - {"nixl"}
    if unknown:
        raise TransferBenchError(f"no transport {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}, nixl")
    unknown = set(bench.parts) - set(PART_NAMES)
    if unknown:
        raise TransferBenchError(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PART_NAMES)}")
    skipped = {name: reason for name in (*KINDS, "nixl") if (reason := _why_not(name, num_gpus, bench.one_gpu))}
    wanted = bench.transports or tuple(name for name in (*KINDS, "nixl") if name not in skipped)
    impossible = [f"{name}: {skipped[name]}" for name in wanted if name in skipped]
    if impossible:
        raise TransferBenchError("; ".join(impossible))
    either = [name for name in wanted if name in EITHER_MEMORY]
    host_only = {name: reason for name in either if (reason := _why_not_on_gpus(name, num_gpus, bench.one_gpu))}
    paths = [path for name in wanted for path in _paths_of(name, bench, name in either and name not in host_only)]
    skipped = {} if bench.transports else skipped
    return paths, skipped | {f"{name}, GPU memory": reason for name, reason in host_only.items() if num_gpus}


def _paths_of(name: str, bench: TransferBench, on_gpus: bool) -> Iterator[Path]:
    if name == "nvlink":
        for programs in bench.programs or (0,):
            yield Path(f"nvlink, {programs} programs" if programs else name, name, "cuda", programs)
        if bench.copy_engines:
            yield Path("nvlink, copy engines", name, "cuda", copy_engines=True)
    else:
        yield Path(name, name, "cpu")
        if on_gpus:
            yield Path(f"{name}, GPU memory", name, "cuda")


def _why_not_on_gpus(name: str, num_gpus: int, one_gpu: bool) -> str | None:
    needed = 1 if one_gpu else 2
    if num_gpus < needed:
        return f"{num_gpus} GPUs, it needs {needed}"
    try:
        return "this UCX has no CUDA" if name == "ucx" and not provider.moves_gpu_memory() else None
    except ClusterError as error:
        return str(error)


def _why_not(name: str, num_gpus: int, one_gpu: bool) -> str | None:
    if name == "nvlink":
        return _why_not_on_gpus(name, num_gpus, one_gpu)
    if name == "nixl":
        return None if transfer_nixl.is_installed() else "not installed (nixl-cu13 or nixl-cu12)"
    if name == "ucx":
        try:
            provider.find_libucp()
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
        self._writer.call("close")                              # a pool is freed when nobody maps it any more
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
        ours = self._beside_own("sender: prefill that sends its KV", 1, PREFILL_KV_BYTES, in_order=True)
        self._writer.call("prepare", here, there)
        flooded = self._beside_own("sender: prefill, pages without a pause", FLOODING_WRITES, page_bytes * num_pages, in_order=False)
        return [ours, flooded, self._beside_arriving()]

    def _beside_own(self, work: str, num_writes: int, num_bytes: int, in_order: bool) -> LoadRow:
        alone, beside, speeds = [], [], []
        for _ in range(LOAD_ROUNDS):
            alone.append(self._writer.call("compute", "prefill", PREFILL_LAYERS, 0, in_order).ms)
            computed = self._writer.call("compute", "prefill", PREFILL_LAYERS, num_writes, in_order)
            beside.append(computed.ms)
            speeds.append(PREFILL_LAYERS * num_writes * num_bytes / computed.busy_s / 1e9)
        return LoadRow(self._path.name, work, *map(statistics.median, (alone, beside, speeds)))

    def _beside_arriving(self) -> LoadRow:
        """GB/s between two looks at the receiver's counter: they fall if the flood ends before the work does."""
        alone, beside, speeds = [], [], []
        for _ in range(LOAD_ROUNDS):
            alone.append(self._receiver.call("compute", "decode", DECODE_STEPS, 0, False).ms)
            self._receiver.call("reset")
            self._writer.call("write", FLOODING_WRITES * DECODE_STEPS)
            before, started = self._receiver.call("num_counted"), time.monotonic()
            beside.append(self._receiver.call("compute", "decode", DECODE_STEPS, 0, False).ms)
            num_pages = self._receiver.call("num_counted") - before
            speeds.append(num_pages * LOAD_CASE[0] / (time.monotonic() - started) / 1e9)
            self._writer.call("stop")
        work = "receiver: decode's copies while pages arrive"
        return LoadRow(self._path.name, work, *map(statistics.median, (alone, beside, speeds)))


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
    gpus = _gpus_of(path, one_gpu)
    with remote(path, cluster, "writer", gpus[0]) as writer, remote(path, cluster, "receiver", gpus[1]) as receiver:
        yield Pair(path, writer, receiver)


def _gpus_of(path: Path, one_gpu: bool) -> tuple[str | None, str | None]:
    """What each end sees, in the words of CUDA_VISIBLE_DEVICES; None: as this process."""
    if path.device != "cuda":
        return None, None
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
