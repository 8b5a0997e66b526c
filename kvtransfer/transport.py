"""One-sided page writes with counting: the one interface of all transports, in the manner of RDMA WRITE with immediate.

    receiver: register(pool) ──► MemoryDescriptor ──────────────────────────► writer: connect(descriptor) ──► Peer
    receiver: reset(imm)                                                       writer: write_pages(peer, src, dst, imm) …
    receiver: num_landed(imm) == announced?   ◄═══ pages, then the count ════  writer: stop(peer, imm) when cancelled
    receiver: fence(writer) when the writer is confirmed dead, before its blocks are used again

No order among writes is assumed; a count never runs ahead of its pages. Nothing calls back.

A Transport has one pool, of one rank, and counts in what is written at once: pages or pieces of them (`layout.py`). A Bundle is what a
worker has of them, over all its ranks; its page ids are those of whole pages.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..messages.errors import PeerGone
from ..messages.ids import Imm
from ..messages.membership import MemoryDescriptor
from .layout import KVLayout

NUM_IMMS = 4096
"""Counters of one pool: how many handoffs into it can be in flight."""

LOOK_S = 0.001

IdArray = npt.NDArray[np.int64]
PageIds = Sequence[int] | IdArray
"""Of one pool. Arrays cost the host no object per page."""

FEW_PAGES = 64
"""Told best as a list: on a core that has rested, NumPy's calls take longer to begin than a list of so many pages takes to be made."""

Target = Sequence[MemoryDescriptor]
"""A peer's memory: one for each of its ranks and transports."""


def as_array(pages: PageIds) -> IdArray:
    """Without a Python object per page where the sequence allows it: ranges, numpy arrays, array('q')."""
    if isinstance(pages, range):
        return np.arange(pages.start, pages.stop, pages.step, dtype=np.int64)
    return np.asarray(pages, dtype=np.int64)


class KVMemory(Protocol):
    """A worker's, of all its ranks: block ids are the same in each."""

    @property
    def layout(self) -> KVLayout: ...

    @property
    def ranks(self) -> "tuple[KVPool, ...]": ...

    @property
    def num_blocks(self) -> int: ...


@dataclass(frozen=True)
class KVPool:
    """One rank's KV memory, in the layout's shape; all of a worker's, if it has one rank."""

    layout: KVLayout
    tensor: torch.Tensor

    @property
    def num_blocks(self) -> int:
        return int(self.tensor.shape[0])

    @property
    def ranks(self) -> "tuple[KVPool, ...]":
        return (self,)


@dataclass(frozen=True)
class Peer:
    """Remote memory that this process can write into."""

    descriptor: MemoryDescriptor


@dataclass(frozen=True)
class TransferStats:
    """Since start, of one transport's writes."""

    num_pages: int = 0
    num_bytes: int = 0
    busy_s: float = 0.0

    def plus(self, num_pages: int, num_bytes: int, busy_s: float) -> "TransferStats":
        return TransferStats(self.num_pages + num_pages, self.num_bytes + num_bytes, self.busy_s + busy_s)


class Transport(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def gathers(self) -> bool:
        """Whether a step's pages should leave late and together: being used at all costs its links something, beside what is moved."""
        ...

    @property
    def overlaps(self) -> bool:
        """Whether writes to several peers are under way at once; otherwise each waits for those before it."""
        ...

    def allocate(self, layout: KVLayout, num_blocks: int) -> KVPool:
        """This process's own pool, in memory that peers can reach. Raises ClusterError with the sizes if there is no room."""
        ...

    def adopt(self, pool: KVPool) -> None:
        """Instead of `allocate`: a pool in memory that another transport of this process has allocated. Raises ClusterError."""
        ...

    def register(self, pool: KVPool) -> MemoryDescriptor:
        """Makes the pool reachable."""
        ...

    def connect(self, descriptor: MemoryDescriptor) -> Peer | None:
        """Returns at once; None: the peer is being dialled, call again. Raises PeerGone, LayoutMismatch (page sizes differ)."""
        ...

    def disconnect(self, peer: Peer) -> None:
        """Unmaps, and ends a dialling; writes under way are waited for or ended by force. Unknown peers are ignored."""
        ...

    def fence(self, writer: MemoryDescriptor, timeout_s: float) -> bool:
        """Of a writer that is confirmed dead: True once nothing of it can land here any more, also if it lives on, on another host."""
        ...

    def write_pages(self, peer: Peer, src_pages: PageIds, dst_pages: PageIds, imm: Imm) -> None:
        """Starts copying local pages to remote ones and counting them at the receiver. Returns at once; the sources must stay
        as they are until the receiver has confirmed, or `stop` has returned. Raises PeerGone."""
        ...

    def stop(self, peer: Peer, imm: Imm, timeout_s: float) -> bool:
        """Drops what has not been written for `imm`; True once no write for it is under way any more."""
        ...

    def settled(self, peer: Peer, imm: Imm) -> bool:
        """No write for `imm` waits or is under way: what was written from may change."""
        ...

    def busy_s(self, peer: Peer, imm: Imm) -> float:
        """Time spent so far on writes for `imm`, since it was last stopped."""
        ...

    def num_landed(self, imm: Imm) -> int:
        """Pages that arrived here for `imm` since its last reset."""
        ...

    def reset(self, imm: Imm) -> None: ...

    @property
    def stats(self) -> TransferStats: ...

    def close(self) -> None:
        """Frees the pool; peers' writes land nowhere from now on."""
        ...


class Bundle(Protocol):
    """All transports of one worker over its one memory, in the spec's order of preference until they have been measured."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def descriptors(self) -> tuple[MemoryDescriptor, ...]:
        """Once registered."""
        ...

    # the receiver's side

    def allocate(self, layout: KVLayout, num_blocks: int) -> KVMemory:
        """Raises ClusterError."""
        ...

    def register(self, pool: KVMemory) -> tuple[MemoryDescriptor, ...]: ...

    @property
    def num_imms(self) -> int:
        """How many counters there are to lend: 0 to num_imms - 1."""
        ...

    def num_landed(self, imm: Imm) -> int:
        """Pieces: a page is whole with `layout.pieces_per_page` of them."""
        ...

    def reset(self, imm: Imm) -> None: ...

    def fence(self, writer: Target, timeout_s: float) -> bool:
        """True once nothing of a writer that is confirmed dead can land here any more, whatever it came over."""
        ...

    # the writer's side

    def connect(self, target: Target) -> Peer | None:
        """None: being dialled, call again. Raises PeerGone (with each one's reason), LayoutMismatch, TransferError: nothing in common."""
        ...

    def common(self, target: Target) -> list[str]:
        """Transports that both sides have, the preferred first."""
        ...

    def connect_over(self, name: str, target: Target) -> Peer | None:
        """Over one that is in common, whichever is preferred. None: being dialled. Raises PeerGone, LayoutMismatch."""
        ...

    def prefer(self, target: Target, names: Sequence[str]) -> None:
        """From now on, until it is disconnected; what is under way stays where it is."""
        ...

    def num_links(self, target: Target) -> int:
        """How often `connect` has found a link where there was none, or another than before."""
        ...

    def disconnect(self, target: Target) -> None: ...

    def write_pages(self, peer: Peer, src_pages: PageIds, dst_pages: PageIds, imm: Imm) -> None:
        """Raises PeerGone, TransferError: some of it may have been started then."""
        ...

    def gathers(self, peer: Peer) -> bool: ...

    def stop(self, peer: Peer, imm: Imm, timeout_s: float) -> bool: ...

    def settled(self, peer: Peer, imm: Imm) -> bool: ...

    def busy_s(self, peer: Peer, imm: Imm) -> float: ...

    @property
    def stats(self) -> TransferStats:
        """In whole pages."""
        ...

    def close(self) -> None: ...


def connect_within(transport: Transport, descriptor: MemoryDescriptor, timeout_s: float) -> Peer:
    """Raises PeerGone, LayoutMismatch."""
    deadline = time.monotonic() + timeout_s
    while (peer := transport.connect(descriptor)) is None:
        if time.monotonic() >= deadline:
            transport.disconnect(Peer(descriptor))
            raise PeerGone(f"no link to {descriptor.host} over {transport.name} within {timeout_s} s")
        time.sleep(LOOK_S)
    return peer
