"""Which piece goes where, if a writer's ranks share the heads of a page otherwise than the receiver's: pure.

    K of a page, 8 heads in pieces of 2      │  0  │  1  │  2  │  3  │
    writer, 2 ranks                          └── rank 0 ─┴── rank 1 ─┘
    receiver, 4 ranks                        └─ 0 ─┴─ 1 ─┴─ 2 ─┴─ 3 ─┘        one route for each two ranks that share some

V follows K in each rank's part of a page. A piece's id in a rank's pool is page id × the rank's pieces of a page + its place in there.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from .transport import IdArray


@dataclass(frozen=True)
class Sharing:
    """Of the `num_pieces` of K (and as many of V) of a page among `num_ranks`. Raises ValueError."""

    num_pieces: int
    num_ranks: int

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or self.num_pieces % self.num_ranks:
            raise ValueError(f"{self.num_pieces} pieces cannot be shared by {self.num_ranks} ranks")

    @property
    def each(self) -> int:
        """Pieces of K that a rank has."""
        return self.num_pieces // self.num_ranks

    @property
    def per_page(self) -> int:
        """Pieces that a rank has of a page."""
        return 2 * self.each

    def pieces_of(self, rank: int) -> range:
        return range(rank * self.each, (rank + 1) * self.each)

    def places(self, rank: int, pieces: range) -> IdArray:
        """Of `pieces` of K, then of the same of V, in the rank's part of a page."""
        first = np.arange(pieces.start, pieces.stop) - rank * self.each
        return np.concatenate((first, first + self.each))


@dataclass(frozen=True, eq=False)
class Route:
    """From one rank to one rank. Pieces at `here` in each page's part there go to those at `there`."""

    source: int
    target: int
    channel: int                   # of those that write to the target, which one this is
    per_page: tuple[int, int]      # pieces of a page: the source has, the target has
    here: IdArray
    there: IdArray

    def sources(self, pages: IdArray) -> IdArray:
        """Piece ids in the source's pool, page by page: neighbours stay neighbours."""
        return _expanded(pages, self.per_page[0], self.here)

    def targets(self, pages: IdArray) -> IdArray:
        return _expanded(pages, self.per_page[1], self.there)


@cache
def routes(num_pieces: int, num_sources: int, num_targets: int) -> tuple[Route, ...]:
    """By target, then by source. Raises ValueError."""
    here, there = Sharing(num_pieces, num_sources), Sharing(num_pieces, num_targets)
    return tuple(route for target in range(num_targets) for route in _into(target, here, there))


def _into(target: int, here: Sharing, there: Sharing) -> list[Route]:
    wanted, found = there.pieces_of(target), list[Route]()
    for source in range(here.num_ranks):
        had = here.pieces_of(source)
        both = range(max(wanted.start, had.start), min(wanted.stop, had.stop))
        if both:
            places = here.places(source, both), there.places(target, both)
            found.append(Route(source, target, len(found), (here.per_page, there.per_page), *places))
    return found


def _expanded(pages: IdArray, per_page: int, places: IdArray) -> IdArray:
    return np.add.outer(pages * per_page, places).ravel()
