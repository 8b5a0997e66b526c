"""All transports of one rank over its one pool: of a worker that has one rank, all there are.

    allocate: one has the pool in memory of its own, the others adopt it      connect: the first that both sides have and that reaches
    prefer: for one target another order, the fastest first

A handoff uses one transport from its first page to its last, so the pages that have landed for it are the sum over all.
"""

import time
from collections.abc import Callable, Sequence

from ..messages.ids import Imm
from ..messages.membership import MemoryDescriptor
from .layout import KVLayout
from .link_choice import LinkChoice
from .transport import NUM_IMMS, KVMemory, KVPool, PageIds, Peer, Target, TransferStats, Transport


class TransportBundle:
    """A Bundle."""

    num_imms = NUM_IMMS

    def __init__(
        self, transports: Sequence[Transport], owner: str | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`owner` names the one that allocates; None: the first."""
        assert transports
        self._transports = {transport.name: transport for transport in transports}
        self._owner = self._transports[owner or transports[0].name]
        self._links = LinkChoice(self.names, clock)
        self.descriptors: tuple[MemoryDescriptor, ...] = ()          # once registered

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._transports)

    # the receiver's side

    def allocate(self, layout: KVLayout, num_blocks: int) -> KVPool:
        """Raises ClusterError."""
        pool = self._owner.allocate(layout, num_blocks)
        for transport in self._transports.values():
            if transport is not self._owner:
                transport.adopt(pool)
        return pool

    def register(self, pool: KVMemory) -> tuple[MemoryDescriptor, ...]:
        (of_rank,) = pool.ranks
        self.descriptors = tuple(transport.register(of_rank) for transport in self._transports.values())
        return self.descriptors

    def num_landed(self, imm: Imm) -> int:
        return sum(transport.num_landed(imm) for transport in self._transports.values())

    def reset(self, imm: Imm) -> None:
        for transport in self._transports.values():
            transport.reset(imm)

    def fence(self, writer: Target, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        known = [each for each in writer if each.transport in self._transports]
        return all(self._transports[each.transport].fence(each, max(0.0, deadline - time.monotonic())) for each in known)

    # the writer's side

    def connect(self, target: Target) -> Peer | None:
        """Raises PeerGone, LayoutMismatch, TransferError."""
        theirs = {descriptor.transport: descriptor for descriptor in target}
        return self._links.connect(target, lambda name: self._transports[name].connect(theirs[name]))

    def common(self, target: Target) -> list[str]:
        return self._links.common(target)

    def connect_over(self, name: str, target: Target) -> Peer | None:
        """Raises PeerGone, LayoutMismatch."""
        return self._transports[name].connect(next(descriptor for descriptor in target if descriptor.transport == name))

    def prefer(self, target: Target, names: Sequence[str]) -> None:
        self._links.prefer(target, names)

    def num_links(self, target: Target) -> int:
        return self._links.num_links(target)

    def disconnect(self, target: Target) -> None:
        self._links.forget(target)
        for descriptor in target:
            if descriptor.transport in self._transports:
                self._transports[descriptor.transport].disconnect(Peer(descriptor))

    def write_pages(self, peer: Peer, src_pages: PageIds, dst_pages: PageIds, imm: Imm) -> None:
        """Raises PeerGone, TransferError."""
        self._of(peer).write_pages(peer, src_pages, dst_pages, imm)

    def gathers(self, peer: Peer) -> bool:
        return self._of(peer).gathers

    def overlaps(self, peer: Peer) -> bool:
        return self._of(peer).overlaps

    def stop(self, peer: Peer, imm: Imm, timeout_s: float) -> bool:
        return self._of(peer).stop(peer, imm, timeout_s)

    def settled(self, peer: Peer, imm: Imm) -> bool:
        return self._of(peer).settled(peer, imm)

    def busy_s(self, peer: Peer, imm: Imm) -> float:
        return self._of(peer).busy_s(peer, imm)

    def _of(self, peer: Peer) -> Transport:
        return self._transports[peer.descriptor.transport]

    @property
    def stats(self) -> TransferStats:
        total = TransferStats()
        for transport in self._transports.values():
            total = total.plus(transport.stats.num_pages, transport.stats.num_bytes, transport.stats.busy_s)
        return total

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()
