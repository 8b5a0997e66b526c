"""Transport for tests and the simulator: pools are tensors of one process, and writes wait in flight until somebody lands them.

The fabric's owner decides when and in which order writes land, and which links are down. A killed writer's writes are still in flight: they
may land, or be lost, until the receiver fences that writer. Pages and their count land as one, as on the real ones.
"""

from dataclasses import dataclass, field

import torch

from ..messages.errors import LayoutMismatch, PeerGone, TransferError
from ..messages.ids import Imm
from ..messages.membership import MemoryDescriptor
from .layout import KVLayout
from .transport import NUM_IMMS, KVPool, PageIds, Peer, TransferStats


@dataclass(frozen=True)
class Write:
    """Pages in flight; what they hold was read when they left."""

    writer: bytes
    target: bytes
    pages: torch.Tensor
    dst_pages: tuple[int, ...]
    imm: Imm


@dataclass
class FakeFabric:
    pools: dict[bytes, KVPool] = field(default_factory=dict)
    counters: dict[bytes, list[int]] = field(default_factory=dict)
    in_flight: list[Write] = field(default_factory=list)
    cut: set[tuple[bytes, bytes]] = field(default_factory=set)        # links (writer, target) that are down

    def transport(self, name: str) -> "FakeTransport":
        return FakeTransport(self, name.encode())

    def land(self, index: int = 0) -> None:
        """One write arrives; into a dead peer's memory it goes nowhere."""
        write = self.in_flight.pop(index)
        pool = self.pools.get(write.target)
        if pool is not None:
            as_pages(pool)[list(write.dst_pages)] = write.pages
            self.counters[write.target][write.imm] += len(write.dst_pages)

    def land_all(self) -> None:
        while self.in_flight:
            self.land()

    def kill(self, name: bytes) -> None:
        """The process is gone with its memory; what it had sent is still under way."""
        self.pools.pop(name, None)

    def mend(self) -> None:
        """Links that were down are up again: what was under way on them has landed by now, or never will."""
        while self.cut:
            self.lose(*self.cut.pop())

    def lose(self, writer: bytes, target: bytes) -> None:
        """What is in flight from one to the other will never land."""
        self.in_flight = [write for write in self.in_flight if (write.writer, write.target) != (writer, target)]


def as_pages(pool: KVPool) -> torch.Tensor:
    """[num_pages, elements of a page], or of pieces of pages."""
    return pool.tensor.view(-1, pool.layout.piece_bytes // pool.layout.dtype.itemsize)


@dataclass
class FakeTransport:
    fabric: FakeFabric
    location: bytes
    name: str = "fake"
    pool: KVPool | None = None
    stats: TransferStats = field(default_factory=TransferStats)
    page_s: float = 0.0                      # what a page that was sent counts as busy time
    busy: dict[tuple[bytes, Imm], float] = field(default_factory=dict)
    fences: bool = True                      # False: `fence` runs into its timeout
    gathers: bool = False
    overlaps: bool = False

    def allocate(self, layout: KVLayout, num_blocks: int) -> KVPool:
        self.pool = KVPool(layout, torch.zeros(layout.shape(num_blocks), dtype=layout.dtype))
        return self.pool

    def adopt(self, pool: KVPool) -> None:
        self.pool = pool

    def register(self, pool: KVPool) -> MemoryDescriptor:
        self.fabric.pools[self.location] = pool
        self.fabric.counters[self.location] = [0] * NUM_IMMS
        return MemoryDescriptor(self.name, "fake", self.location, len(as_pages(pool)), pool.layout.piece_bytes, NUM_IMMS)

    def connect(self, descriptor: MemoryDescriptor) -> Peer | None:
        assert self.pool is not None
        if descriptor.page_bytes != self.pool.layout.piece_bytes:
            raise LayoutMismatch(f"pages of {descriptor.page_bytes} bytes there, {self.pool.layout.piece_bytes} here")
        if descriptor.location not in self.fabric.pools:
            raise PeerGone(f"{descriptor.location.decode()} is gone")
        return None if (self.location, descriptor.location) in self.fabric.cut else Peer(descriptor)

    def disconnect(self, peer: Peer) -> None:
        self.fabric.lose(self.location, peer.descriptor.location)

    def fence(self, writer: MemoryDescriptor, timeout_s: float) -> bool:
        if self.fences:
            self.fabric.lose(writer.location, self.location)
        return self.fences

    def write_pages(self, peer: Peer, src_pages: PageIds, dst_pages: PageIds, imm: Imm) -> None:
        assert self.pool is not None
        if peer.descriptor.location not in self.fabric.pools or (self.location, peer.descriptor.location) in self.fabric.cut:
            raise PeerGone(f"{peer.descriptor.location.decode()} is gone")
        if not 0 <= min(dst_pages, default=0) <= max(dst_pages, default=0) < len(as_pages(self.fabric.pools[peer.descriptor.location])):
            raise TransferError(f"pages {min(dst_pages)} to {max(dst_pages)} are not there")
        pages = as_pages(self.pool)[torch.tensor(src_pages)].clone()
        key = (peer.descriptor.location, imm)
        self.busy[key] = self.busy.get(key, 0.0) + len(dst_pages) * self.page_s
        self.fabric.in_flight.append(Write(self.location, peer.descriptor.location, pages, tuple(map(int, dst_pages)), imm))

    def stop(self, peer: Peer, imm: Imm, timeout_s: float) -> bool:
        """What is in flight cannot be called back: like a NIC, it must land first."""
        if not self.settled(peer, imm):
            return False
        self.busy.pop((peer.descriptor.location, imm), None)
        return True

    def settled(self, peer: Peer, imm: Imm) -> bool:
        key = (self.location, peer.descriptor.location, imm)
        return all((write.writer, write.target, write.imm) != key for write in self.fabric.in_flight)

    def busy_s(self, peer: Peer, imm: Imm) -> float:
        return self.busy.get((peer.descriptor.location, imm), 0.0)

    def num_landed(self, imm: Imm) -> int:
        return self.fabric.counters[self.location][imm]

    def reset(self, imm: Imm) -> None:
        self.fabric.counters[self.location][imm] = 0

    def close(self) -> None:
        self.fabric.kill(self.location)
