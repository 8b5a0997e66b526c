"""KV pages from one GPU into another of the same host, through the public `write_pages`: GB/s, latency, and the cost to work beside it.

    PYTHONPATH=tests python tests/bench/transfer_nvlink.py [--programs 4 8 16 32 64] [--one-gpu] [--only rates latency cost copy]

Two processes, each of which sees one GPU. Pages are scattered on both sides. A rate is taken from the first call until the receiver, which
polls its counter, has seen all pages: of one call, of a burst of 16 calls, and (busy) as the side stream's own events have it. Medians.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any
from uuid import uuid4

from harness.nvlink_peer import NvlinkPeer, nvlink_peer, shuffled

CASES = [(4 << 10, 4096), (32 << 10, 2048), (64 << 10, 2048), (256 << 10, 1024)]
SHAPES = [(16, 32 << 10)]               # warps, tile bytes
NUM_ROUNDS = 5
BURST = 16
TIMEOUT_S = 20.0


class Pair:
    def __init__(self, writer: NvlinkPeer, receiver: NvlinkPeer) -> None:
        self.writer, self.receiver = writer, receiver

    def open(self, page_bytes: int, num_pages: int, engine: str = "sm", shape: tuple[int, int, int] | None = None) -> None:
        self.page_bytes, self.num_pages = page_bytes, num_pages
        self.receiver.tell("open", page_bytes, num_pages)
        self.writer.tell("open", page_bytes, num_pages, engine, shape)
        self.target = self.receiver.answer()
        self.writer.answer()
        self.writer.call("connect", self.target)
        self.source, self.places = shuffled(num_pages, 1), shuffled(num_pages, 2)

    def seconds(self, src: Sequence[int], dst: Sequence[int], num_times: int = 1) -> float:
        """From the first call until all are counted."""
        self.receiver.call("reset", 0)
        self.receiver.tell("landed_at", 0, len(src) * num_times, TIMEOUT_S)
        time.sleep(0.002)
        started = self.writer.call("write", self.target, src, dst, 0, num_times)
        landed = self.receiver.answer()
        self.writer.call("stop", self.target, 0, TIMEOUT_S)
        return float(landed - started)

    def gbps(self, num_times: int = 1) -> float:
        num_bytes = self.page_bytes * self.num_pages * num_times
        return median(num_bytes / self.seconds(self.source, self.places, num_times) / 1e9 for _ in range(NUM_ROUNDS))

    def busy_gbps(self) -> float:
        _, bytes_before, busy_before = self.writer.call("stats")
        self.seconds(self.source, self.places, 4)
        _, num_bytes, busy_s = self.writer.call("stats")
        return float((num_bytes - bytes_before) / (busy_s - busy_before) / 1e9)


def rates(pair: Pair, programs: Sequence[int]) -> None:
    print("GB/s: one call / burst of 16 / busy")
    print(f"{'programs':>20}" + "".join(f"{f'{size >> 10} KiB x {count}':>22}" for size, count in CASES))
    for shape in ((number, *rest) for rest in SHAPES for number in programs):
        line = f"{f'{shape[0]} ({shape[1]}w {shape[2] >> 10}K)':>20}"
        for case in CASES:
            pair.open(*case, "sm", shape)
            pair.seconds(pair.source, pair.places, 2)
            line += f"{pair.gbps():8.0f}{pair.gbps(BURST):7.0f}{pair.busy_gbps():7.0f}"
        print(line, flush=True)


def copy_engine(pair: Pair) -> None:
    line = f"{'copy engines':>20}"
    for case in CASES:
        pair.open(*case, "copy")
        pair.seconds(pair.source, pair.places, 1)
        line += f"{pair.gbps():8.0f}{pair.gbps(4):7.0f}{pair.busy_gbps():7.0f}"
    print(line, flush=True)


def latency(pair: Pair) -> None:
    print("latency of 32 KiB pages, write_pages to counted, us: p50 / p99 of 200")
    pair.open(32 << 10, 2048)
    for count in (1, 16, 64, 256):
        times = sorted(pair.seconds(pair.source[:count], pair.places[:count]) * 1e6 for _ in range(200))
        print(f"{count:>6} pages {times[100]:8.1f} {times[198]:8.1f}", flush=True)


def configurations(programs: Sequence[int]) -> Iterator[tuple[str, str, tuple[int, int, int] | None]]:
    for number in programs:
        yield f"{number} programs", "sm", (number, *SHAPES[0])
    yield "copy engines", "copy", None


def cost(pair: Pair, programs: Sequence[int]) -> None:
    """Writes of 128 MiB; six of them last longer than a product, two longer than a device copy."""
    print("slow-down of work while 64 KiB pages flow without a pause, %: gemm 8192^3 / device copy of 1 GiB")
    print(f"{'':>16}{'writer GPU':>18}{'receiver GPU':>18}{'GB/s beside gemm':>20}")
    for name, engine, shape in configurations(programs):
        pair.open(64 << 10, 2048, engine, shape)
        where: Any = (pair.target, pair.source, pair.places)
        pair.seconds(pair.source, pair.places, 480)                    # pins what is in flight below
        here, there, speed = [], [], 0.0
        for kind, num_times, num_writes in (("gemm", 40, 6), ("copy", 80, 2)):
            alone = pair.writer.call("work", kind, num_times)
            _, bytes_before, busy_before = pair.writer.call("stats")
            here.append(pair.writer.call("work_and_write", kind, num_times, *where, num_writes) / alone - 1)
            _, num_bytes, busy_s = pair.writer.call("stats")
            speed = speed or (num_bytes - bytes_before) / (busy_s - busy_before) / 1e9
            alone = pair.receiver.call("work", kind, num_times)
            pair.writer.call("write", *where, 0, 40 * num_writes * num_times // 20)
            there.append(pair.receiver.call("work", kind, num_times) / alone - 1)
            pair.writer.call("stop", pair.target, 0, TIMEOUT_S)
        print(f"{name:>16}" + "".join(f"{side[0]:10.1%}{side[1]:8.1%}" for side in (here, there)) + f"{speed:20.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--programs", nargs="+", type=int, default=[4, 8, 16, 32, 64])
    parser.add_argument("--one-gpu", action="store_true", help="both processes on the first GPU: no link, a dry run")
    parser.add_argument("--only", nargs="+", default=["rates", "copy", "latency", "cost"])
    arguments = parser.parse_args()
    cluster = f"bench{uuid4().hex[:8]}"
    with nvlink_peer(cluster, "writer", 0) as writer, nvlink_peer(cluster, "receiver", 0 if arguments.one_gpu else 1) as receiver:
        pair = Pair(writer, receiver)
        if "rates" in arguments.only:
            rates(pair, arguments.programs)
        if "latency" in arguments.only:
            latency(pair)
        if "copy" in arguments.only:
            copy_engine(pair)
        if "cost" in arguments.only:
            cost(pair, arguments.programs)


if __name__ == "__main__":
    main()
