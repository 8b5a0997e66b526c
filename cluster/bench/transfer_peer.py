"""One end of `diptych bench transfer`: a transport with a pool, in a process of its own, called over a pipe.

    command ──(method, arguments)──► process: an End ──► answer, or what it raised

Processes are spawned, and each sees one GPU only, as under Ray; the command starts no CUDA while they run. Instants are of the monotonic
clock, which all processes of a host share.
"""

import multiprocessing as mp
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, Protocol

import torch
from msgspec import Struct

from ...kvtransfer.layout import KVLayout
from ...kvtransfer.selection import KINDS, Owner
from ...kvtransfer.transport import IdArray, KVPool, Peer, Transport, connect_within
from ...messages.errors import DiptychError
from ...messages.ids import Epoch, Imm, WorkerId
from ...messages.membership import MemoryDescriptor
from .errors import TransferBenchError

CALL_TIMEOUT_S = 120.0          # of the slowest call, which starts CUDA and compiles a kernel
COUNT_TIMEOUT_S = 60.0
JOIN_TIMEOUT_S = 20.0
IMM = Imm(0)


class Written(Struct, frozen=True):
    """Of one or several calls in a row; seconds of the monotonic clock."""

    started_s: float
    returned_s: float


class Computed(Struct, frozen=True):
    ms: float                                   # of one piece of work
    busy_s: float                               # of the writes beside it all


class Path(Struct, frozen=True):
    """A way for pages: what the table calls it and how its ends are made."""

    name: str
    transport: str                              # of KINDS, or "nixl"
    device: str                                 # of the pools
    programs: int = 0                           # nvlink: of the kernel; 0: the default
    copy_engines: bool = False


class End(Protocol):
    """What a process does; the descriptor's type is its own affair."""

    def open(self, page_bytes: int, num_pages: int) -> Any:
        """A fresh pool; what the other end must know of it."""
        ...

    def connect(self, descriptor: Any) -> None: ...

    def prepare(self, src: IdArray, dst: IdArray) -> None:
        """Of the next writes."""
        ...

    def write(self, num_times: int) -> Written: ...

    def stop(self) -> float:
        """Once nothing is under way; the seconds that the writes since the last stop have taken by the transport's own account."""
        ...

    def reset(self) -> None: ...

    def counted_at(self, num_pages: int) -> float:
        """When so many have arrived since the reset."""
        ...

    def close(self) -> None: ...


class TransportEnd:
    def __init__(self, path: Path, cluster: str, name: str) -> None:
        self._path, self._cluster, self._name = path, cluster, WorkerId(name)
        self._epoch = 0
        self._transport: Transport | None = None
        self._peer: Peer | None = None

    @property
    def running(self) -> tuple[Transport, Peer]:
        assert self._transport is not None
        assert self._peer is not None
        return self._transport, self._peer

    def open(self, page_bytes: int, num_pages: int) -> MemoryDescriptor:
        layout = KVLayout("bytes", torch.uint8, num_layers=1, num_kv_heads=1, head_dim=page_bytes // 32, block_size=16)
        return self.allocate(layout, num_pages)

    def allocate(self, layout: KVLayout, num_blocks: int) -> MemoryDescriptor:
        self.close()
        self._epoch += 1
        self._transport, self._busy_s = self._make(), 0.0
        self._pool: KVPool | None = self._transport.allocate(layout, num_blocks)
        return self._transport.register(self._pool)

    def _make(self) -> Transport:
        owner = Owner(self._cluster, self._name, Epoch(self._epoch), self._path.device)
        if not (self._path.programs or self._path.copy_engines):
            return KINDS[self._path.transport].make(owner)
        from ...kernels.page_push import DEFAULT_SHAPE, PushShape  # needs Triton
        from ...kvtransfer.nvlink.transport import NvlinkTransport

        shape = PushShape(self._path.programs or DEFAULT_SHAPE.num_programs)
        engine: Literal["copy", "sm"] = "copy" if self._path.copy_engines else "sm"
        return NvlinkTransport(owner.cluster, owner.worker_id, owner.epoch, torch.device("cuda"), engine, shape)

    def connect(self, descriptor: MemoryDescriptor) -> None:
        assert self._transport is not None
        self._peer = connect_within(self._transport, descriptor, COUNT_TIMEOUT_S)

    def prepare(self, src: IdArray, dst: IdArray) -> None:
        self._src, self._dst = src, dst

    def write(self, num_times: int) -> Written:
        transport, peer = self.running
        started_s = time.monotonic()
        for _ in range(num_times):
            transport.write_pages(peer, self._src, self._dst, IMM)
        return Written(started_s, time.monotonic())

    def stop(self) -> float:
        transport, peer = self.running
        if not transport.stop(peer, IMM, COUNT_TIMEOUT_S):
            raise TransferBenchError(f"writes have not ended in {COUNT_TIMEOUT_S} s")
        before, self._busy_s = self._busy_s, transport.stats.busy_s
        return self._busy_s - before

    def reset(self) -> None:
        assert self._transport is not None
        self._transport.reset(IMM)

    def counted_at(self, num_pages: int) -> float:
        """As a decode worker looks that waits for announced pages: without a pause."""
        assert self._transport is not None
        give_up_at = time.monotonic() + COUNT_TIMEOUT_S
        while (landed := self._transport.num_landed(IMM)) < num_pages:
            os.sched_yield()
            if time.monotonic() > give_up_at:
                raise TransferBenchError(f"{landed} of {num_pages} pages over {self._path.name} after {COUNT_TIMEOUT_S} s")
        return time.monotonic()

    def num_counted(self) -> int:
        assert self._transport is not None
        return self._transport.num_landed(IMM)

    def compute(self, kind: str, num_times: int, writes_each: int, in_order: bool) -> Computed:
        """`writes_each` writes are started by each piece of work."""
        from .transfer_load import compute_ms

        ms = compute_ms(kind, num_times, (lambda: self.write(writes_each)) if writes_each else None, in_order)
        return Computed(ms, self.stop() if writes_each else 0.0)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = self._peer = self._pool = None


MakeEnd = Callable[["Path", str, str], Any]
"""Called in the new process; whoever makes an end knows its methods."""


def _serve(pipe: "Connection[Any, Any]", path: Path, cluster: str, name: str, gpu: str | None, make: MakeEnd) -> None:
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu                # CUDA has not been started yet
    torch.set_num_threads(1)
    end = make(path, cluster, name)
    while True:
        method, arguments = pipe.recv()
        if method == "end":
            end.close()
            return
        try:
            pipe.send(getattr(end, method)(*arguments))
        except Exception as error:
            pipe.send(error if isinstance(error, DiptychError) else TransferBenchError(f"{path.name}, {name}: {error!r}"))


def page_end(path: Path, cluster: str, name: str) -> End:
    if path.transport == "nixl":
        from .transfer_nixl import NixlEnd

        return NixlEnd(path, name)
    return TransportEnd(path, cluster, name)


class Remote:
    """An end's process, seen from the command."""

    def __init__(self, path: Path, cluster: str, name: str, gpu: str | None, make: MakeEnd) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._name = f"{path.name}, {name}"
        self._process = context.Process(target=_serve, args=(theirs, path, cluster, name, gpu, make), daemon=True)
        self._process.start()

    def call(self, method: str, *arguments: object) -> Any:
        self.tell(method, *arguments)
        return self.answer()

    def tell(self, method: str, *arguments: object) -> None:
        """Does not wait; `answer` has the result."""
        self._pipe.send((method, arguments))

    def answer(self) -> Any:
        """Raises what the process raised, TransferBenchError if it has ended or is silent."""
        if not wait([self._pipe, self._process.sentinel], CALL_TIMEOUT_S) or not self._pipe.poll():
            raise TransferBenchError(f"{self._name}: no answer in {CALL_TIMEOUT_S} s; exit code {self._process.exitcode}")
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        if self._process.is_alive():
            self.tell("end")
            self._process.join(JOIN_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
        self._process.join(JOIN_TIMEOUT_S)


@contextmanager
def remote(path: Path, cluster: str, name: str, gpu: str | None, make: MakeEnd = page_end) -> Iterator[Remote]:
    """`gpu`: the only one that it sees, None for all."""
    end = Remote(path, cluster, name, gpu, make)
    try:
        yield end
    finally:
        end.end()
