"""All transports of one worker over its one pool, in the spec's order of preference until they have been measured.

    allocate: one has the pool in memory of its own, the others adopt it      connect: the first that both sides have and that reaches
    prefer: for one target another order, the fastest first

A handoff uses one transport from its first page to its last, so the pages that have landed for it are the sum over all.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..messages.errors import PeerGone, TransferError
from ..messages.ids import Imm
from ..messages.membership import MemoryDescriptor
from .layout import KVLayout
from .transport import KVPool, PageIds, Peer, TransferStats, Transport

logger = logging.getLogger(__name__)

Target = tuple[MemoryDescriptor, ...]
"""Of one peer, one for each of its transports."""

DIAL_S = 1.0                   # so long a peer may be dialled before the next transport is taken; less than a handoff waits for it


@dataclass
class _Link:
    """To one target."""

    order: Sequence[str] = ()      # of transports, before those that are not named in it
    over: str | None = None        # the one that was found last; None: there is no link
    count: int = 0                 # how often it was found anew, or another one


class TransportBundle:
    def __init__(
        self, transports: Sequence[Transport], owner: str | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`owner` names the one that allocates; None: the first."""
        assert transports
        self._transports = {transport.name: transport for transport in transports}
        self._owner = self._transports[owner or transports[0].name]
        self._clock = clock
        self._links: dict[Target, _Link] = defaultdict(_Link)
        self._dialled_at: dict[MemoryDescriptor, float] = {}
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

    def register(self, pool: KVPool) -> tuple[MemoryDescriptor, ...]:
        self.descriptors = tuple(transport.register(pool) for transport in self._transports.values())
        return self.descriptors

    def num_landed(self, imm: Imm) -> int:
        return sum(transport.num_landed(imm) for transport in self._transports.values())

    def reset(self, imm: Imm) -> None:
        for transport in self._transports.values():
            transport.reset(imm)

    def fence(self, writer: Sequence[MemoryDescriptor], timeout_s: float) -> bool:
        """True once nothing of a writer that is confirmed dead can land here any more, whatever it came over."""
        return all(self._transports[d.transport].fence(d, timeout_s) for d in writer if d.transport in self._transports)

    # the writer's side

    def connect(self, target: Sequence[MemoryDescriptor]) -> Peer | None:
        """None: being dialled, call again. Raises PeerGone (with each one's reason), LayoutMismatch, TransferError: nothing in common."""
        theirs, link = {descriptor.transport: descriptor for descriptor in target}, self._links[tuple(target)]
        common = self.common(target)
        if not common:
            raise TransferError(f"no transport in common: {', '.join(self._transports)} here, {', '.join(theirs) or 'none'} there")
        refusals: list[str] = []
        is_dialling = False
        for name in common:
            try:
                peer = self._transports[name].connect(theirs[name])
            except PeerGone as error:
                refusals.append(f"{name}: {error}")
                continue
            if peer is not None:
                self._dialled_at.pop(theirs[name], None)
                self._report(target[0].host, link, name, refusals)
                return peer
            is_dialling = True
            dialled_s = self._clock() - self._dialled_at.setdefault(theirs[name], self._clock())
            if dialled_s < DIAL_S:
                link.over = None
                return None
            refusals.append(f"{name}: not reached after {dialled_s:.1f} s")
        link.over = None
        if is_dialling:
            return None
        raise PeerGone("; ".join(refusals))

    def common(self, target: Sequence[MemoryDescriptor]) -> list[str]:
        """Transports that both sides have, the preferred first."""
        theirs = {descriptor.transport for descriptor in target}
        order = dict.fromkeys([*self._links[tuple(target)].order, *self._transports])
        return [name for name in order if name in theirs and name in self._transports]

    def connect_over(self, name: str, target: Sequence[MemoryDescriptor]) -> Peer | None:
        """Over one that is in common, whichever is preferred. None: being dialled. Raises PeerGone, LayoutMismatch."""
        return self._transports[name].connect(next(descriptor for descriptor in target if descriptor.transport == name))

    def prefer(self, target: Sequence[MemoryDescriptor], names: Sequence[str]) -> None:
        """From now on, until it is disconnected; what is under way stays where it is."""
        self._links[tuple(target)].order = names

    def num_links(self, target: Sequence[MemoryDescriptor]) -> int:
        """How often `connect` has found a link where there was none, or another than before."""
        return self._links[tuple(target)].count

    def _report(self, host: str, link: _Link, name: str, refusals: list[str]) -> None:
        """A fall-back is never silent."""
        if link.over != name:
            link.over, link.count = name, link.count + 1
            reasons = f", since {'; '.join(refusals)}" if refusals else ""
            logger.log(logging.WARNING if refusals else logging.INFO, "KV to %s goes over %s%s", host, name, reasons)

    def disconnect(self, target: Sequence[MemoryDescriptor]) -> None:
        self._links.pop(tuple(target), None)
        for descriptor in target:
            self._dialled_at.pop(descriptor, None)
            if descriptor.transport in self._transports:
                self._transports[descriptor.transport].disconnect(Peer(descriptor))

    def write_pages(self, peer: Peer, src_pages: PageIds, dst_pages: PageIds, imm: Imm) -> None:
        """Raises PeerGone, TransferError."""
        self._of(peer).write_pages(peer, src_pages, dst_pages, imm)

    def gathers(self, peer: Peer) -> bool:
        return self._of(peer).gathers

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
