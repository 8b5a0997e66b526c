"""Where pages are made that a receiver of another layout can take: a small pool of its layout, from which they are written as any others.

    own pool ──converter──► free staging pages ──write_pages──► receiver
                                  ▲                   │ settled: the handoff's writes so far have left
                                  └───────────────────┘

All ranks make the same page of a prompt in the same staging page, each its own heads of it. The pool is made and registered once. A page
is held while writes of its handoff may read it, and no longer: so whatever is held comes back by itself, or when the handoff has stopped,
and a pool of one page would do. What finds no page free waits in its handoff's line.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..messages.ids import BlockId, Imm
from .conversion import Converter, require_convertible
from .layout import KVLayout
from .plan import PagePlan, PageWrites
from .transport import Bundle, IdArray, KVMemory, Peer, as_array


class Staging:
    def __init__(self, source: KVMemory, pool: KVMemory, transport: Bundle, scales: Tensor | None = None) -> None:
        """`pool` is `transport`'s own, with the source's ranks on the source's devices. `scales` [num_layers, 2, kv_heads] fp32 are of all
        heads. Raises LayoutMismatch: not to be converted."""
        require_convertible(source.layout, pool.layout)
        self.pool = pool
        self.transport = transport
        self._converters = [
            Converter(of_rank, made, _of_rank(scales, rank, source.layout.rank_heads))
            for rank, (of_rank, made) in enumerate(zip(source.ranks, pool.ranks, strict=True))
        ]
        self._free = deque(range(pool.num_blocks * pool.layout.num_layers))
        self._open: list[StagedPages] = []
        transport.register(pool)

    @property
    def layout(self) -> KVLayout:
        return self.pool.layout

    @property
    def num_free(self) -> int:
        return len(self._free)

    def open(self, plan: PagePlan, src_blocks: Sequence[BlockId], peer: Peer, imm: Imm) -> "StagedPages":
        """`plan` counts in the receiver's blocks: its sources are the prompt's blocks by index. To be closed."""
        pages = StagedPages(self, plan, np.array(src_blocks, dtype=np.int64), peer, imm)
        self._open.append(pages)
        return pages

    def close(self, pages: "StagedPages") -> None:
        self._open.remove(pages)

    def take(self, count: int) -> list[int]:
        """Up to `count` pages."""
        if count > len(self._free):
            for pages in self._open:
                pages.give_back_settled()
        return [self._free.popleft() for _ in range(min(count, len(self._free)))]

    def give_back(self, pages: list[int]) -> None:
        self._free.extend(pages)

    def make(self, pages: IdArray, targets: IdArray, src_blocks: IdArray) -> None:
        """As `Converter.make`, in all ranks."""
        for converter in self._converters:
            converter.make(pages, targets, src_blocks)


def _of_rank(scales: Tensor | None, rank: int, num_heads: int) -> Tensor | None:
    return None if scales is None else scales[:, :, rank * num_heads : (rank + 1) * num_heads].contiguous()


class StagedPages:
    """One handoff's pages, in place of its PagePlan: `take` makes what it hands out."""

    def __init__(self, staging: Staging, plan: PagePlan, src_blocks: IdArray, peer: Peer, imm: Imm) -> None:
        self._staging = staging
        self._plan = plan
        self._src_blocks = src_blocks
        self._target = peer, imm
        self._due = plan.take(range(0), 0)                     # not made yet, for want of free pages
        self._held: list[int] = []

    @property
    def num_pages(self) -> int:
        return self._plan.num_pages

    @property
    def num_skipped(self) -> int:
        return self._plan.num_skipped

    @property
    def is_short(self) -> bool:
        """Something is due that found no page."""
        return len(self._due) > 0

    @property
    def finished(self) -> bool:
        return self._plan.finished and not self.is_short

    def take(self, layers: range, num_ready: int) -> PageWrites:
        """Of what is due as much as there are free pages for; they must be written before anything else is taken."""
        new, due = self._plan.take(layers, num_ready), self._due
        src, dst = (np.concatenate([as_array(each) for each in ids]) for ids in ((due.src, new.src), (due.dst, new.dst)))
        pages = self._staging.take(len(src))
        self._held += pages
        made = np.array(pages, dtype=np.int64)
        if pages:
            self._staging.make(src[: len(pages)], made, self._src_blocks)
        self._due = PageWrites(src[len(pages) :], dst[len(pages) :])
        return PageWrites(made, dst[: len(pages)])

    def give_back_settled(self) -> None:
        if self._held and self._staging.transport.settled(*self._target):
            self._give_back()

    def close(self) -> None:
        """Its writes have stopped, or their receiver has them all, or is gone and disconnected."""
        self._give_back()
        self._staging.close(self)

    def _give_back(self) -> None:
        self._staging.give_back(self._held)
        self._held = []
