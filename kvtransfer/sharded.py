"""All transports of a worker whose peers may share the heads of a page among another number of ranks: a TransportBundle for each rank here.

    rank 0: TransportBundle ═══ route ═══► the target's rank 0          a page ─► its pieces, route by route (`sharding.py`)
                            ═══ route ═══► the target's rank 1          landed: the sum over ranks, in pieces
    rank 1: …

All routes to a target take one transport, so that what is measured of it is true: if one route cannot, none does. A counter has one
writer at a time, so the ranks that write to the same one count in counters of their own: the imm that a receiver lends stands for as many
neighbours as there can be such ranks.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import msgspec

from ..messages.errors import LayoutMismatch
from ..messages.ids import Imm
from ..messages.membership import MemoryDescriptor
from .bundle import TransportBundle
from .layout import KVLayout
from .link_choice import LinkChoice
from .sharding import Route, routes
from .transport import NUM_IMMS, KVMemory, KVPool, PageIds, Peer, Target, TransferStats, as_array


@dataclass(frozen=True)
class KVShards:
    """A worker's KV memory: a pool for each rank, all with the same blocks."""

    layout: KVLayout
    ranks: tuple[KVPool, ...]

    @property
    def num_blocks(self) -> int:
        return self.ranks[0].num_blocks


@dataclass(frozen=True)
class _Link:
    """One route, open."""

    route: Route
    peer: Peer
    imms: int                      # that one lent by the target stands for

    def imm(self, lent: Imm) -> Imm:
        return Imm(lent * self.imms + self.route.channel)


@dataclass(frozen=True)
class ShardedPeer(Peer):
    """All ranks of a worker, over one transport; `descriptor` is of the first."""

    links: tuple[_Link, ...]


class ShardedBundle:
    """A Bundle. Its memory's layout has pieces."""

    def __init__(self, ranks: Sequence[TransportBundle], clock: Callable[[], float] = time.monotonic) -> None:
        """All with the same transports."""
        assert ranks
        assert all(rank.names == ranks[0].names for rank in ranks), [rank.names for rank in ranks]
        self._ranks = tuple(ranks)
        self._links = LinkChoice(self.names, clock)
        self._layout: KVLayout | None = None
        self.descriptors: tuple[MemoryDescriptor, ...] = ()          # once registered

    @property
    def names(self) -> tuple[str, ...]:
        return self._ranks[0].names

    @property
    def layout(self) -> KVLayout:
        assert self._layout is not None, "nothing is allocated yet"
        return self._layout

    # the receiver's side

    def allocate(self, layout: KVLayout, num_blocks: int) -> KVShards:
        """Raises ClusterError."""
        assert layout.piece_heads > 0, "whole pages are written by a TransportBundle"
        assert layout.tp_size == len(self._ranks), f"{layout.tp_size} ranks share the pages, {len(self._ranks)} have transports"
        self._layout = layout
        with ExitStack() as undo:                    # if one has no room, nothing stays of the others
            undo.callback(self.close)
            shards = KVShards(layout, tuple(rank.allocate(layout, num_blocks) for rank in self._ranks))
            undo.pop_all()
        return shards

    def register(self, pool: KVMemory) -> tuple[MemoryDescriptor, ...]:
        told = [rank.register(part) for rank, part in zip(self._ranks, pool.ranks, strict=True)]
        self.descriptors = tuple(
            msgspec.structs.replace(each, rank=rank, num_imms=self.num_imms) for rank, of_rank in enumerate(told) for each in of_rank
        )
        return self.descriptors

    @property
    def num_imms(self) -> int:
        return NUM_IMMS // self._imms_of_one(len(self._ranks))

    def num_landed(self, imm: Imm) -> int:
        return sum(rank.num_landed(counter) for rank in self._ranks for counter in self._counters(imm))

    def reset(self, imm: Imm) -> None:
        for rank in self._ranks:
            for counter in self._counters(imm):
                rank.reset(counter)

    def fence(self, writer: Target, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        return all(rank.fence(writer, max(0.0, deadline - time.monotonic())) for rank in self._ranks)

    def _counters(self, imm: Imm) -> list[Imm]:
        """Of each rank, that a lent imm stands for."""
        count = self._imms_of_one(len(self._ranks))
        return [Imm(imm * count + channel) for channel in range(count)]

    def _imms_of_one(self, num_ranks: int) -> int:
        """As many ranks may write to one of `num_ranks`: each at least one of its pieces."""
        return self._num_pieces // num_ranks

    @property
    def _num_pieces(self) -> int:
        """Of K, or of V, of a page."""
        return self.layout.pieces_per_page // 2

    # the writer's side

    def connect(self, target: Target) -> Peer | None:
        """Raises PeerGone, LayoutMismatch, TransferError."""
        return self._links.connect(target, lambda name: self.connect_over(name, target))

    def common(self, target: Target) -> list[str]:
        return self._links.common(target)

    def connect_over(self, name: str, target: Target) -> Peer | None:
        """None: some route is being dialled. Raises PeerGone, LayoutMismatch."""
        there = sorted((each for each in target if each.transport == name), key=lambda each: each.rank)
        self._require_fit(there, num_ranks=len({each.rank for each in target}))
        imms, links = self._imms_of_one(len(there)), list[_Link]()
        is_dialling = False
        for route in routes(self._num_pieces, len(self._ranks), len(there)):
            peer = self._ranks[route.source].connect_over(name, (there[route.target],))
            if peer is None:
                is_dialling = True
            else:
                links.append(_Link(route, peer, imms))
        return None if is_dialling else ShardedPeer(there[0], tuple(links))

    def _require_fit(self, there: list[MemoryDescriptor], num_ranks: int) -> None:
        """`there`: of one transport, one for each rank. Raises LayoutMismatch."""
        for each in there:
            if each.page_bytes != self.layout.piece_bytes:
                raise LayoutMismatch(f"pages of {each.page_bytes} bytes there, pieces of {self.layout.piece_bytes} here")
        ranks, sizes = [each.rank for each in there], {each.num_pages for each in there}
        if ranks != list(range(num_ranks)) or self._num_pieces % num_ranks or len(sizes) > 1:
            whose = f"ranks {ranks} of {num_ranks} with {sorted(sizes)} pieces each"
            raise LayoutMismatch(f"{whose} share the {self._num_pieces} pieces of K of a page there")
        if (most := max(each.num_imms for each in there) * self._imms_of_one(len(there))) > NUM_IMMS:
            raise LayoutMismatch(f"{most} counters of each of {len(there)} ranks there, {NUM_IMMS} are known here")

    def prefer(self, target: Target, names: Sequence[str]) -> None:
        self._links.prefer(target, names)

    def num_links(self, target: Target) -> int:
        return self._links.num_links(target)

    def disconnect(self, target: Target) -> None:
        self._links.forget(target)
        for rank in self._ranks:
            rank.disconnect(target)

    def write_pages(self, peer: Peer, src_pages: PageIds, dst_pages: PageIds, imm: Imm) -> None:
        """Raises PeerGone, TransferError: other routes may have started."""
        here, there = as_array(src_pages), as_array(dst_pages)
        for link in _links_of(peer):
            rank, route = self._ranks[link.route.source], link.route
            rank.write_pages(link.peer, route.sources(here), route.targets(there), link.imm(imm))

    def gathers(self, peer: Peer) -> bool:
        return any(self._of(link).gathers(link.peer) for link in _links_of(peer))

    def stop(self, peer: Peer, imm: Imm, timeout_s: float) -> bool:
        """All routes drop what has not left before any is waited for."""
        give_up_at = time.monotonic() + timeout_s
        left = [link for link in _links_of(peer) if not self._of(link).stop(link.peer, link.imm(imm), 0.0)]
        if not left or timeout_s <= 0:
            return not left
        return all(self._of(link).stop(link.peer, link.imm(imm), max(0.0, give_up_at - time.monotonic())) for link in left)

    def settled(self, peer: Peer, imm: Imm) -> bool:
        return all(self._of(link).settled(link.peer, link.imm(imm)) for link in _links_of(peer))

    def busy_s(self, peer: Peer, imm: Imm) -> float:
        """The longest of the ranks: they write at the same time. A rank's writes to several others do so too, or take turns."""
        times_s, links = defaultdict[int, list[float]](list), _links_of(peer)
        for link in links:
            times_s[link.route.source].append(self._of(link).busy_s(link.peer, link.imm(imm)))
        whole = max if self._of(links[0]).overlaps(links[0].peer) else sum
        return max(whole(of_rank) for of_rank in times_s.values())

    def _of(self, link: _Link) -> TransportBundle:
        return self._ranks[link.route.source]

    @property
    def stats(self) -> TransferStats:
        ranks = [rank.stats for rank in self._ranks]
        num_pieces = sum(each.num_pages for each in ranks)
        return TransferStats(
            num_pages=num_pieces // self.layout.pieces_per_page,
            num_bytes=sum(each.num_bytes for each in ranks),
            busy_s=max(each.busy_s for each in ranks),
        )

    def close(self) -> None:
        for rank in self._ranks:
            rank.close()


def _links_of(peer: Peer) -> tuple[_Link, ...]:
    assert isinstance(peer, ShardedPeer), f"a link of one rank: {peer}"
    return peer.links
