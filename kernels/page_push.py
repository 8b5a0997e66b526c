"""Copies scattered pages of one KV pool into another pool, which may be a peer GPU's, and then counts them in the receiver's host memory.

    tile 0, P, 2P …  ─► program 0 ─┐ each: stores; barrier; release on `arrived`
    tile 1, P + 1 …  ─► program 1 ─┼─► the last one to arrive: count += number of pages
    …                              ┘

P programs take all tiles in turn, so P bounds how many SMs the copy occupies. A tile is a part of one page, or several whole pages where
those are small: what a program has in flight, and so its share of the link's speed, does not depend on the page size. The next tile is read
before the last one is stored. The count never runs ahead: the arrivals are acquire-release at system scope, and a barrier before each
makes it stand for all of its program's stores. Programs of one launch share `arrived`: launches that share it must follow each other.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from dataclasses import dataclass
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

WORD_BYTES = 8
VECTOR_BYTES = 16              # of a thread's load or store


class Addressable(Protocol):
    """A tensor, or an address that is none of torch's."""

    @property
    def dtype(self) -> torch.dtype: ...

    def data_ptr(self) -> int: ...


@dataclass(frozen=True)
class PushShape:
    num_programs: int = 16
    num_warps: int = 16
    tile_bytes: int = 32 << 10         # in registers twice: 2 × 64 bytes of a thread

    def rows_and_words(self, page_words: int) -> tuple[int, int]:
        """Pages of a tile, and words of each: powers of 2."""
        words = min(triton.next_power_of_2(page_words), self.tile_bytes // WORD_BYTES)
        return max(1, self.tile_bytes // WORD_BYTES // words), words


DEFAULT_SHAPE = PushShape()


@dataclass(frozen=True)
class Counting:
    counters: Addressable              # int64, the receiver's, reachable from the device
    index: int                         # which of them
    num_pages: int                     # to add
    arrived: Tensor                    # [1] int32, 0 between launches


def push_pages(
    source: Tensor, target: Addressable, page_ids: Tensor, num_pages: int, page_words: int, counting: Counting, shape: PushShape
) -> None:
    """source, target: pools as int64 words; page_ids [2 × num_pages] int64: the pages here, then those there. On the current stream."""
    rows, words = shape.rows_and_words(page_words)
    num_tiles = triton.cdiv(num_pages, rows) * triton.cdiv(page_words, words)
    _push_kernel[(max(1, min(shape.num_programs, num_tiles)),)](
        source, target, page_ids, num_pages, counting.counters, counting.index, counting.num_pages, counting.arrived,
        PAGE_WORDS=page_words, ROWS=rows, WORDS=words, num_warps=shape.num_warps,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_pages", "index", "count"])
def _push_kernel(
    source, target, page_ids, num_pages, counters, index, count, arrived,
    PAGE_WORDS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = (PAGE_WORDS + WORDS - 1) // WORDS
    num_tiles = tl.cdiv(num_pages, ROWS) * parts
    step = tl.num_programs(0)
    first = tl.program_id(0)
    src, dst = _ids(page_ids, num_pages, first, parts, ROWS)
    words = _load(source, src, num_pages, first, parts, PAGE_WORDS, ROWS, WORDS)
    next_src, next_dst = _ids(page_ids, num_pages, first + step, parts, ROWS)
    for tile in range(first, num_tiles, step):
        next_words = _load(source, next_src, num_pages, tile + step, parts, PAGE_WORDS, ROWS, WORDS)
        later_src, later_dst = _ids(page_ids, num_pages, tile + 2 * step, parts, ROWS)
        places, there = _places(target, dst, num_pages, tile, parts, PAGE_WORDS, ROWS, WORDS)
        tl.store(places, words, mask=there)
        words, dst = next_words, next_dst
        next_src, next_dst = later_src, later_dst
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel", scope="sys") == step - 1:
        tl.store(arrived, 0)
        counter = counters + index
        tl.store(counter, tl.load(counter, volatile=True) + count, cache_modifier=".wt")


@triton.jit
def _ids(page_ids, num_pages, tile, parts: tl.constexpr, ROWS: tl.constexpr):
    """The pages of a tile, here and there: [ROWS] each."""
    rows = (tile // parts) * ROWS + tl.arange(0, ROWS)
    there = rows < num_pages
    return tl.load(page_ids + rows, mask=there, other=0), tl.load(page_ids + num_pages + rows, mask=there, other=0)


@triton.jit
def _places(pool, pages, num_pages, tile, parts: tl.constexpr, PAGE_WORDS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Where a tile's words lie in a pool, and which of them exist: [ROWS, WORDS]."""
    words = (tile % parts) * WORDS + tl.arange(0, WORDS)
    there = ((tile // parts) * ROWS + tl.arange(0, ROWS) < num_pages)[:, None]
    if PAGE_WORDS % WORDS != 0:
        there = there & (words < PAGE_WORDS)[None, :]
    return pool + (pages * PAGE_WORDS)[:, None] + words[None, :], there


@triton.jit
def _load(pool, pages, num_pages, tile, parts: tl.constexpr, PAGE_WORDS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    places, there = _places(pool, pages, num_pages, tile, parts, PAGE_WORDS, ROWS, WORDS)
    return tl.load(places, mask=there, other=0)
