"""Which pages a writer still has to write: pure bookkeeping, one object per accepted handoff.

A prompt is computed chunk by chunk and, inside a chunk, layer by layer. So in each layer the blocks that are ready form a leading
run, and one number per layer says how many have been handed out already. A page is handed out exactly once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import numpy as np

from ..messages.ids import BlockId
from .transport import FEW_PAGES, IdArray, PageIds


@dataclass(frozen=True)
class PageWrites:
    """Page `src[i]` here goes to page `dst[i]` there."""

    src: PageIds
    dst: PageIds

    def __len__(self) -> int:
        return len(self.src)


@dataclass
class PagePlan:
    num_layers: int
    src_blocks: Sequence[BlockId]              # all blocks of the prompt, here
    dst_blocks: Sequence[BlockId]              # the receiver's, for blocks from num_skipped on
    num_skipped: int                           # leading blocks that the receiver has
    _num_out: list[int] = field(init=False)    # per layer: leading blocks that are done with

    def __post_init__(self) -> None:
        if self.num_skipped + len(self.dst_blocks) != len(self.src_blocks):
            raise ValueError(f"{self.num_skipped} skipped + {len(self.dst_blocks)} to write are not {len(self.src_blocks)} blocks")
        self._num_out = [self.num_skipped] * self.num_layers

    @property
    def num_pages(self) -> int:
        """Of the whole handoff."""
        return len(self.dst_blocks) * self.num_layers

    @property
    def finished(self) -> bool:
        return all(out == len(self.src_blocks) for out in self._num_out)

    def take(self, layers: range, num_ready: int) -> PageWrites:
        """The pages of `layers` that are due now that the first `num_ready` blocks are complete in them."""
        runs = list(self._due(layers, num_ready))
        if sum((index.stop - index.start) * len(layers) for index, layers in runs) <= FEW_PAGES:
            return PageWrites(*(self._listed(blocks, runs) for blocks in (self._written_from, self.dst_blocks)))
        return PageWrites(*(_pages(pages, runs) for pages in self._first_pages))

    @property
    def _written_from(self) -> Sequence[BlockId]:
        return self.src_blocks[self.num_skipped :]

    @cached_property
    def _first_pages(self) -> tuple[IdArray, IdArray]:
        """In layer 0, [blocks to write]: here, there."""
        here, there = (np.array(blocks, dtype=np.int64) * self.num_layers for blocks in (self._written_from, self.dst_blocks))
        return here, there

    def _listed(self, blocks: Sequence[BlockId], runs: list[tuple[slice, range]]) -> list[int]:
        return [block * self.num_layers + layer for index, layers in runs for block in blocks[index] for layer in layers]

    def _due(self, layers: range, num_ready: int) -> Iterator[tuple[slice, range]]:
        """Blocks to write (by index) of neighbouring layers that stand alike, which are done with from now on."""
        late = [layer for layer in layers if self._num_out[layer] < num_ready]
        for (num_out, _), run in groupby(enumerate(late), key=lambda each: (self._num_out[each[1]], each[1] - each[0])):
            alike = [layer for _, layer in run]
            self._num_out[alike[0] : alike[-1] + 1] = [num_ready] * len(alike)
            yield slice(num_out - self.num_skipped, num_ready - self.num_skipped), range(alike[0], alike[-1] + 1)


def leave_after(layer: int, num_layers: int, layer_group: int, gathers: bool) -> bool:
    """Whether pages leave once `layer` is computed: at the end of each group of layers, or (`gathers`) of the last two. Then most of a
    step's pages leave in one go, with a group still to be computed beside them, and the few of that group behind it."""
    num_done = layer + 1
    if num_done == num_layers:
        return True
    return num_done % layer_group == 0 and (not gathers or num_done + layer_group >= num_layers)


def may_wait(num_ready: int, num_blocks: int) -> bool:
    """Whether the `num_ready` leading blocks of a prompt's `num_blocks` may leave with later ones, so that their link wakes once. What is
    still to be computed must take far longer than all of them on the link: a quarter of a prompt does, some twenty times (an 8B model on
    an H200, 26 µs a token to compute and 0.35 to send)."""
    return 4 * (num_blocks - num_ready) >= num_blocks


def _pages(first_pages: IdArray, runs: list[tuple[slice, range]]) -> IdArray:
    """Block by block: layers of one block are neighbours in memory, here and there."""
    pages = [np.add.outer(first_pages[index], np.arange(layers.start, layers.stop)).ravel() for index, layers in runs]
    return pages[0] if len(pages) == 1 else np.concatenate(pages)
