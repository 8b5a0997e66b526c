"""An `nvlink` transport in a process of its own, called over a pipe: what is killed and stopped in the tests.

The process that calls it needs no CUDA. `gpu` becomes the only GPU that the process sees, as Ray sets it up.
"""

import array
import multiprocessing as mp
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
from harness.peer_process import PeerProcess, serve_calls

from diptych.kvtransfer.layout import KVLayout
from diptych.kvtransfer.transport import Peer
from diptych.messages.ids import Epoch, Imm, WorkerId
from diptych.messages.membership import MemoryDescriptor


def byte_layout(page_bytes: int) -> KVLayout:
    """One layer, so that a page is a block."""
    return KVLayout("bytes", torch.uint8, num_layers=1, num_kv_heads=1, head_dim=page_bytes // 32, block_size=16)


def shuffled(num_pages: int, seed: int) -> "array.array[int]":
    return array.array("q", random.Random(seed).sample(range(num_pages), num_pages))


class Served:
    """What runs in the process; `NvlinkPeer.call` reaches its methods from the other side of the pipe."""

    def __init__(self, cluster: str, worker: str, epoch: int) -> None:
        torch.set_num_threads(1)
        torch.cuda.set_device(0)
        self._names = (cluster, WorkerId(worker), Epoch(epoch))
        self._peers: dict[bytes, Peer] = {}
        self._transport: Any = None

    def open(self, page_bytes: int, num_pages: int, engine: str = "sm", shape: tuple[int, int, int] | None = None) -> MemoryDescriptor:
        """A fresh transport and pool; shape: programs, warps, tile bytes."""
        from diptych.kernels.page_push import DEFAULT_SHAPE, PushShape
        from diptych.kvtransfer.nvlink.transport import NvlinkTransport

        self.close()
        push = DEFAULT_SHAPE if shape is None else PushShape(*shape)
        self._transport = NvlinkTransport(*self._names, torch.device("cuda"), engine, push)  # type: ignore[arg-type]
        self._pool = self._transport.allocate(byte_layout(page_bytes), num_pages)
        self._pages = self._pool.tensor.view(num_pages, page_bytes)
        return self._transport.register(self._pool)  # type: ignore[no-any-return]

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = self._pool = self._pages = None
            self._peers.clear()

    # the receiver's side

    def reset(self, imm: int) -> None:
        self._transport.reset(Imm(imm))

    def num_landed(self, imm: int) -> int:
        return int(self._transport.num_landed(Imm(imm)))

    def landed_at(self, imm: int, num_pages: int, timeout_s: float) -> float:
        """The monotonic clock, which all processes of a host share, when that many were counted."""
        give_up_at = time.monotonic() + timeout_s
        while self._transport.num_landed(Imm(imm)) < num_pages:
            if time.monotonic() > give_up_at:
                raise TimeoutError(f"{self.num_landed(imm)} of {num_pages} pages after {timeout_s} s")
        return time.monotonic()

    def read_when_counted(self, imm: int, num_pages: int, timeout_s: float) -> list[int]:
        self.landed_at(imm, num_pages, timeout_s)
        return self.sums()

    # the pool

    def fill(self, seed: int) -> list[int]:
        """Random bytes; their sums."""
        generator = torch.Generator(device="cuda").manual_seed(seed)
        self._pages.copy_(torch.randint(0, 256, self._pages.shape, dtype=torch.uint8, device="cuda", generator=generator))
        return self.sums()

    def sums(self) -> list[int]:
        """Of each page: every 8 bytes count with their place."""
        words = self._pages.view(torch.int64)
        return (words * torch.arange(1, 2 * words.shape[1], 2, device="cuda")).sum(1).tolist()  # type: ignore[no-any-return]

    # the writer's side

    def connect(self, target: MemoryDescriptor) -> None:
        self._peers[target.location] = self._transport.connect(target)

    def disconnect(self, target: MemoryDescriptor) -> None:
        self._transport.disconnect(self._peers.get(target.location, Peer(target)))

    def write(self, target: MemoryDescriptor, src: Any, dst: Any, imm: int, num_times: int = 1) -> float:
        """The monotonic clock just before."""
        peer = self._peers.get(target.location, Peer(target))
        started = time.monotonic()
        for _ in range(num_times):
            self._transport.write_pages(peer, src, dst, Imm(imm))
        return started

    def write_for_ever(self, target: MemoryDescriptor, src: Any, dst: Any, imm: int) -> None:
        while True:
            self.write(target, src, dst, imm)
            self.stop(target, imm, 0.01)

    def stop(self, target: MemoryDescriptor, imm: int, timeout_s: float) -> bool:
        return bool(self._transport.stop(self._peers.get(target.location, Peer(target)), Imm(imm), timeout_s))

    def busy_s(self, target: MemoryDescriptor, imm: int) -> float:
        return float(self._transport.busy_s(self._peers[target.location], Imm(imm)))

    def stats(self) -> tuple[int, int, float]:
        stats = self._transport.stats
        return stats.num_pages, stats.num_bytes, stats.busy_s

    def stall(self, seconds: float) -> None:
        """The engine's stream is busy for about that long: what is written next waits for it."""
        torch.cuda._sleep(int(seconds * 1.9e9))


def serve(pipe: Connection, cluster: str, worker: str, epoch: int) -> None:
    serve_calls(pipe, Served(cluster, worker, epoch), worker)


def visible_gpu(index: int) -> str:
    """What CUDA_VISIBLE_DEVICES must be for a process that sees only this one of those that are seen here."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)


class NvlinkPeer(PeerProcess):
    def __init__(self, cluster: str, worker: str, gpu: int, epoch: int = 1) -> None:
        context = mp.get_context("spawn")
        ours, theirs = context.Pipe()
        super().__init__(context.Process(target=serve, args=(theirs, cluster, worker, epoch), daemon=True), ours, last_word="end")
        before = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpu(gpu)
        try:
            self.process.start()
        finally:
            if before is None:
                del os.environ["CUDA_VISIBLE_DEVICES"]
            else:
                os.environ["CUDA_VISIBLE_DEVICES"] = before


@contextmanager
def nvlink_peer(cluster: str, worker: str, gpu: int, epoch: int = 1) -> Iterator[NvlinkPeer]:
    peer = NvlinkPeer(cluster, worker, gpu, epoch)
    try:
        yield peer
    finally:
        peer.end()
