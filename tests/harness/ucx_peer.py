"""A `ucx` transport in a process of its own, called over a pipe: what is killed and stopped in the tests."""

import multiprocessing as mp
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from harness.cable import enter_network
from harness.peer_process import PeerProcess

from diptych.kvtransfer.layout import KVLayout
from diptych.kvtransfer.transport import connect_within
from diptych.kvtransfer.ucx.transport import UcxTransport
from diptych.messages.ids import Imm
from diptych.messages.membership import MemoryDescriptor


def byte_layout(page_bytes: int) -> KVLayout:
    """One layer, so that a page is a block."""
    return KVLayout("bytes", torch.uint8, num_layers=1, num_kv_heads=1, head_dim=page_bytes // 32, block_size=16)


def pages_of(tensor: torch.Tensor) -> torch.Tensor:
    """[num_pages, page bytes]."""
    return tensor.view(tensor.shape[0], -1)


class Served:
    """What runs in the process; `UcxPeer` has the same methods on the other side of the pipe."""

    def __init__(self, page_bytes: int, num_pages: int, stall_s: float, device: str) -> None:
        torch.set_num_threads(1)
        self.transport = UcxTransport(torch.device(device), stall_s)
        self.pool = self.transport.allocate(byte_layout(page_bytes), num_pages)
        self.descriptor = self.transport.register(self.pool)

    def describe(self) -> MemoryDescriptor:
        return self.descriptor

    def reset(self, imm: int) -> None:
        self.transport.reset(Imm(imm))

    def num_landed(self, imm: int) -> int:
        return self.transport.num_landed(Imm(imm))

    def landed_at(self, imm: int, num_pages: int, timeout_s: float) -> float:
        """The monotonic clock when that many were counted, which all processes of a host share."""
        deadline = time.monotonic() + timeout_s
        while self.transport.num_landed(Imm(imm)) < num_pages:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.transport.num_landed(Imm(imm))} of {num_pages} pages after {timeout_s} s")
            time.sleep(1e-4)
        return time.monotonic()

    def read(self) -> bytes:
        return pages_of(self.pool.tensor).cpu().numpy().tobytes()

    def num_held(self) -> int:
        """Open file descriptors and foreign shared memory: each line holds some."""
        segments = [line for line in Path("/proc/self/maps").read_text().splitlines() if "SYSV" in line or "ucx_shm" in line]
        return len(os.listdir("/proc/self/fd")) + len(segments)

    def fence(self, writer: MemoryDescriptor) -> bool:
        return self.transport.fence(writer, timeout_s=5.0)

    def write_for_ever(self, target: MemoryDescriptor, imm: int) -> None:
        peer = connect_within(self.transport, target, 5.0)
        everything = range(self.pool.num_blocks)
        while True:
            self.transport.write_pages(peer, everything, everything, Imm(imm))
            while not self.transport.settled(peer, Imm(imm)):    # not `stop`: that drops what has not left yet
                time.sleep(1e-4)


def serve(pipe: Connection, page_bytes: int, num_pages: int, stall_s: float, network: str | None, device: str) -> None:
    if network is not None:
        enter_network(network)
    served = Served(page_bytes, num_pages, stall_s, device)
    pipe.send(served.descriptor)
    while True:
        method, arguments = pipe.recv()
        if method == "close":
            served.transport.close()
            return
        try:
            pipe.send(getattr(served, method)(*arguments))
        except Exception as error:
            pipe.send(error)


class UcxPeer(PeerProcess):
    def __init__(self, page_bytes: int, num_pages: int, stall_s: float = 5.0, network: str | None = None, device: str = "cpu") -> None:
        context = mp.get_context("forkserver")              # forks a process that has imported torch, but has no UCX in it yet
        context.set_forkserver_preload(["diptych.kvtransfer.ucx.transport"])
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, page_bytes, num_pages, stall_s, network, device), daemon=True)
        super().__init__(process, ours, last_word="close")
        process.start()
        self.descriptor: MemoryDescriptor = self.answer()


@contextmanager
def ucx_peer(
    page_bytes: int, num_pages: int, stall_s: float = 5.0, network: str | None = None, device: str = "cpu"
) -> Iterator[UcxPeer]:
    """`network` names the namespace that it lives in."""
    peer = UcxPeer(page_bytes, num_pages, stall_s, network, device)
    try:
        yield peer
    finally:
        peer.end()
