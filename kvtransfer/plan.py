"""Which pages a writer still has to write: pure bookkeeping, one object per accepted handoff.

A prompt is computed chunk by chunk and, inside a chunk, layer by layer. So in each layer the blocks that are ready form a leading
run, and one number per layer says how many have been handed out already. A page is handed out exactly once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..messages.ids import BlockId


@dataclass(frozen=True)
class PageWrites:
    """Parallel lists: page `src[i]` here goes to page `dst[i]` there."""

    src: list[int]
    dst: list[int]


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
        writes = PageWrites([], [])
        for layer in layers:
            for index in range(self._num_out[layer], num_ready):
                writes.src.append(self.src_blocks[index] * self.num_layers + layer)
                writes.dst.append(self.dst_blocks[index - self.num_skipped] * self.num_layers + layer)
            self._num_out[layer] = max(self._num_out[layer], num_ready)
        return writes
