"""A worker's ranks and their transport in a process of its own, called over a pipe: what exchanges pages, is stopped and killed in tests.

The process sees all GPUs; rank r has `devices[r]`.
"""

import multiprocessing as mp
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from harness.peer_process import PeerProcess, serve_calls
from harness.shards import HEADS, Side, fill, whole, write

from diptych.kvtransfer.selection import Owner, make_sharded
from diptych.kvtransfer.transport import Peer
from diptych.messages.errors import DiptychError, PeerGone
from diptych.messages.ids import Epoch, Imm, WorkerId
from diptych.messages.membership import MemoryDescriptor

Target = tuple[MemoryDescriptor, ...]
Numbers = npt.NDArray[Any]

TIMEOUT_S = 20.0
LATE_S = 0.3                    # in which a late write would land


class Served:
    """What runs in the process; `ShardProcess.call` reaches its methods from the other side of the pipe."""

    def __init__(self, transport: str, owner: Owner, devices: Sequence[str], num_blocks: int) -> None:
        torch.set_num_threads(1)
        self._side = Side.of(make_sharded([transport], owner, devices), num_blocks, torch.int32)
        self._bundle = self._side.bundle
        self._peers: dict[Target, Peer] = {}

    def describe(self) -> Target:
        return self._bundle.descriptors

    def close(self) -> None:
        self._bundle.close()

    # the receiver's side

    def reset(self, imm: int) -> None:
        self._bundle.reset(Imm(imm))

    def num_landed(self, imm: int) -> int:
        return self._bundle.num_landed(Imm(imm))

    def read_when_landed(self, imm: int, num_pages: int, timeout_s: float) -> Numbers:
        give_up_at = time.monotonic() + timeout_s
        while (counted := self.num_landed(imm)) < self._side.wanted(num_pages):
            if time.monotonic() > give_up_at:
                raise TimeoutError(f"{counted} of {self._side.wanted(num_pages)} pieces after {timeout_s} s")
        return self.read()

    def fence(self, writer: Target, timeout_s: float) -> bool:
        return self._bundle.fence(writer, timeout_s)

    # the memory

    def fill(self, first: int) -> Numbers:
        return fill(self._side.memory, first).numpy()

    def read(self) -> Numbers:
        return whole(self._side.memory).numpy()

    # the writer's side

    def connect(self, target: Target, timeout_s: float = 20.0) -> None:
        give_up_at = time.monotonic() + timeout_s
        while (peer := self._bundle.connect(target)) is None:
            if time.monotonic() > give_up_at:
                raise PeerGone(f"not connected after {timeout_s} s")
            time.sleep(0.002)
        self._peers[target] = peer

    def disconnect(self, target: Target) -> None:
        self._bundle.disconnect(target)

    def write(self, target: Target, pages: dict[int, int], imm: int, num_times: int = 1) -> None:
        for _ in range(num_times):
            write(self._side, self._peers[target], pages, imm)

    def write_and_stop(self, target: Target, pages: dict[int, int], imm: int, num_times: int, timeout_s: float) -> bool:
        self.write(target, pages, imm, num_times)
        return self.stop(target, imm, timeout_s)

    def write_for_ever(self, target: Target, pages: dict[int, int], imm: int) -> None:
        while True:
            self.write(target, pages, imm)
            while not self._bundle.settled(self._peers[target], Imm(imm)):
                time.sleep(1e-4)

    def stop(self, target: Target, imm: int, timeout_s: float) -> bool:
        return self._bundle.stop(self._peers[target], Imm(imm), timeout_s)

    def busy_s(self, target: Target, imm: int) -> float:
        return self._bundle.busy_s(self._peers[target], Imm(imm))

    def stats(self) -> tuple[int, int, float]:
        stats = self._bundle.stats
        return stats.num_pages, stats.num_bytes, stats.busy_s

    def num_mapped(self, name: str) -> int:
        """Of shared memory with `name` in its own."""
        return Path("/proc/self/maps").read_text().count(name)

    def stall(self, seconds: float) -> None:
        """Of each GPU the stream that computes is busy for about so long: what is written next waits for it."""
        for pool in self._side.memory.ranks:
            with torch.cuda.device(pool.tensor.device):
                torch.cuda._sleep(int(seconds * 1.9e9))

    def set_device(self, index: int) -> None:
        """That the calls from now on find current."""
        torch.cuda.set_device(index)

    def current_device(self) -> int:
        return torch.cuda.current_device()


def serve(pipe: Connection, transport: str, owner: Owner, devices: Sequence[str], num_blocks: int) -> None:
    try:
        served = Served(transport, owner, devices, num_blocks)
    except DiptychError as error:
        pipe.send(error)
        return
    pipe.send(served.describe())
    serve_calls(pipe, served, owner.worker_id)


class ShardProcess(PeerProcess):
    def __init__(self, transport: str, owner: Owner, devices: Sequence[str], num_blocks: int) -> None:
        context = mp.get_context("forkserver" if owner.device == "cpu" else "spawn")
        context.set_forkserver_preload(["diptych.kvtransfer.ucx.transport", "diptych.kvtransfer.sharded"])
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, transport, owner, devices, num_blocks), daemon=True)
        super().__init__(process, ours, last_word="end")
        process.start()
        self.target: Target = self.answer()


@contextmanager
def shard_process(
    transport: str, cluster: str, worker: str, devices: Sequence[str], num_blocks: int, epoch: int = 1
) -> Iterator[ShardProcess]:
    process = ShardProcess(transport, Owner(cluster, WorkerId(worker), Epoch(epoch), devices[0].partition(":")[0]), devices, num_blocks)
    try:
        yield process
    finally:
        process.end()


def shuffled(seed: int, num_pages: int, count: int | None = None) -> dict[int, int]:
    """`count` of so many pages (None: all), each to another one."""
    draw = np.random.default_rng(seed)
    here, there = (draw.permutation(num_pages)[:count].tolist() for _ in range(2))
    return dict(zip(here, there, strict=True))


def assert_silent_once_killed(writer: ShardProcess, receiver: ShardProcess, num_pages: int, imm: int, fence_s: float) -> None:
    """The writer dies in the middle of its writes, and is fenced at the first call: nothing of it comes after that."""
    receiver.call("reset", imm)
    writer.tell("write_for_ever", receiver.target, shuffled(imm, num_pages), imm)
    give_up_at = time.monotonic() + TIMEOUT_S
    while receiver.call("num_landed", imm) <= num_pages * 2 * HEADS:
        assert time.monotonic() < give_up_at
    writer.kill()
    assert receiver.call("fence", writer.target, fence_s)
    counted, fresh = receiver.call("num_landed", imm), receiver.call("fill", imm + 1)
    time.sleep(LATE_S)
    assert (receiver.call("read") == fresh).all()
    assert receiver.call("num_landed", imm) == counted


def assert_works(writer: ShardProcess, receiver: ShardProcess, pages: dict[int, int], seed: int) -> None:
    """In four writes: the pages arrive, no other is touched, and the count is full when they are there, not before."""
    numbers, expected, each = writer.call("fill", seed), receiver.call("fill", 10**7 + seed), -(-len(pages) // 4)
    expected[list(pages.values())] = numbers[list(pages)]
    receiver.call("reset", seed)
    receiver.tell("read_when_landed", seed, len(pages), TIMEOUT_S)
    for start in range(0, len(pages), each):
        writer.call("write", receiver.target, dict(list(pages.items())[start : start + each]), seed)
    assert (receiver.answer() == expected).all()
    assert writer.call("stop", receiver.target, seed, TIMEOUT_S)
    assert receiver.call("num_landed", seed) == len(pages) * 2 * HEADS
