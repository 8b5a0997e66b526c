"""Copies scattered pages of one KV pool into another pool, which may be a peer GPU's, and then counts them in the receiver's host memory.

    tiles 0 … n     ─► program 0 ─┐ each: its page ids; its stores; barrier; release on `arrived`
    tiles n + 1 …   ─► program 1 ─┼─► the last one to arrive: count += number of pages; the time, which says that it has ended
    …                             ┘

P programs share all tiles, so P bounds how many SMs the copy occupies. A tile is a part of one page, or several whole pages where
those are small: what a program has in flight, and so its share of the link's speed, does not depend on the page size. The next tile is read
before the last one is stored. The page ids may be in host memory: each program first fetches those of its own tiles, in one go, into device
memory beside it, so that no copy of them has to come before the kernel.

The count never runs ahead: the arrivals are acquire-release at system scope, and a barrier before each makes it stand for all of its
program's stores. Programs of one launch share `arrived`: launches that share it must follow each other. Those that do not may run at the
same time; since a count is a load and a store (not every host lets a GPU add in its memory), `lock` is held for the two.

Launches that run at the same time take turns (`Turns`): each moves pages while the next one fetches its ids and the last one's stores
land. Without turns they would share the link, and so begin and end together.

A launch through Triton looks its kernel up by the arguments: most of the host's time for one page. `PagePush` has done that once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import os
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

WORD_BYTES = 8
VECTOR_BYTES = 16              # of a thread's load or store
ALIGNMENT = 16                 # of addresses; Triton's name for it is "D"
WARPS_OF_AN_SM = 16            # of this kernel at least: 65,536 registers, of which a thread has at most 128
IDS_AT_ONCE = 512              # of each side
MOST_UNFINISHED = 1 << 30      # programs of all launches under way: below half of what an int32 tells apart


@dataclass(frozen=True)
class PushShape:
    """As many programs as an H100 has multiprocessors: what a prefill loses is the time that its pages take, whoever moves them, since the
    kernels beside it wait for their last multiprocessor (docs/benchmarks.md)."""

    num_programs: int = 132
    num_warps: int = 4
    tile_bytes: int = 8 << 10          # in registers twice: 2 × 64 bytes of a thread

    def fit(self, num_launches: int, num_sms: int) -> bool:
        """Whether the programs of so many launches can all be on the GPU at once, when nothing else is."""
        return num_launches * self.num_programs * self.num_warps <= num_sms * WARPS_OF_AN_SM

    def rows_and_words(self, page_words: int) -> tuple[int, int]:
        """Pages of a tile, and words of each: powers of 2."""
        words = min(triton.next_power_of_2(page_words), self.tile_bytes // WORD_BYTES)
        return max(1, self.tile_bytes // WORD_BYTES // words), words


DEFAULT_SHAPE = PushShape()


@dataclass(frozen=True)
class IdBuffers:
    """[2 × num_pages] int64 each: the pages here, then those there."""

    ids: Tensor                        # in memory of the device or mapped for it
    scratch: Tensor                    # of the device: where programs put them


class Turns:
    """Of launches of one device, in the order of this object's calls: none may wait for one that starts after it. A launch of all programs
    that a shape allows moves its first page when at most half as many programs of those before it have pages left. A shorter one waits for
    nobody: it would take little of the link, and be late by far more.

    A program that waits keeps its place on the GPU, so those that may be under way must all fit, or it could keep out what it waits for:
    `has_room`. Where they do not, nobody waits."""

    def __init__(self, finished: Tensor, num_launched: int = 0, has_room: bool = True) -> None:
        """finished: [1] int32 of the device, the programs that have no page left to move, modulo 2^32; here `num_launched`."""
        self.finished = finished
        self.num_launched = num_launched
        self._has_room = has_room

    def after(self, num_programs: int, shape: PushShape) -> int:
        """How many programs of all have finished, modulo 2^32, when one of the next launch may move pages: int32."""
        waits = self._has_room and num_programs == shape.num_programs
        return (self.num_launched - (shape.num_programs // 2 if waits else MOST_UNFINISHED) + 2**31) % 2**32 - 2**31

    def launched(self, num_programs: int) -> None:
        self.num_launched += num_programs


@dataclass(frozen=True)
class Counting:
    counters: Tensor                   # int64, the receiver's, reachable from the device
    index: int                         # which of them
    count: int                         # to add: of pages
    arrived: Tensor                    # [1] int32, 0 between launches
    lock: Tensor                       # [1] int32, 0 when nobody counts
    turns: Turns
    times: Tensor                      # [2] int64, reachable from the device: its nanoseconds when the launch began and when all was over


def push_pages(
    source: Tensor, target: Tensor, page_ids: IdBuffers, num_pages: int, page_words: int, counting: Counting, shape: PushShape
) -> Any:
    """source, target: pools as int64 words. On the current stream. → the compiled kernel."""
    rows, words = shape.rows_and_words(page_words)
    num_programs, turns = _num_programs(shape, num_pages, page_words, rows, words), counting.turns
    compiled = _push_kernel[(num_programs,)](
        source, target, page_ids.ids, page_ids.scratch, num_pages,
        counting.counters, counting.index, counting.count, counting.arrived, counting.lock, counting.times,
        turns.finished, turns.after(num_programs, shape),
        PAGE_WORDS=page_words, ROWS=rows, WORDS=words, IDS=IDS_AT_ONCE, HAS_CLOCK=_has_clock(), num_warps=shape.num_warps,
    )  # fmt: skip
    turns.launched(num_programs)               # not before: nobody may wait for programs that were never started
    return compiled


def _has_clock() -> bool:
    """Triton's interpreter has none: times are 1 there."""
    return os.environ.get("TRITON_INTERPRET") != "1"


def _num_programs(shape: PushShape, num_pages: int, page_words: int, rows: int, words: int) -> int:
    num_tiles = -(-num_pages // rows) * -(-page_words // words)
    return max(1, min(shape.num_programs, num_tiles))


class PagePush:
    """Launches what `push_pages` has compiled, for one pool, page size and device. Addresses instead of tensors, all multiples of 16."""

    def __init__(
        self, compiled: Any, source: Tensor, page_words: int, arrived: Tensor, lock: Tensor, turns: Turns, shape: PushShape
    ) -> None:
        self._run, self._function, self._metadata = compiled.run, compiled.function, compiled.packed_metadata
        self._source, self._arrived, self._lock = source.data_ptr(), arrived.data_ptr(), lock.data_ptr()
        self._turns, self._finished = turns, turns.finished.data_ptr()
        self._shape, self._page_words, self._has_clock = shape, page_words, _has_clock()
        self._rows, self._words = shape.rows_and_words(page_words)
        assert (self._source | self._arrived | self._lock | self._finished) % ALIGNMENT == 0

    def __call__(
        self, target: int, ids: int, scratch: int, num_pages: int, counters: int, index: int, count: int, times: int, stream: int
    ) -> None:
        """On `stream`, a cudaStream_t, with its device current."""
        assert (target | ids | scratch | counters | times) % ALIGNMENT == 0, "the kernel was compiled for aligned addresses"
        num_programs = _num_programs(self._shape, num_pages, self._page_words, self._rows, self._words)
        self._run(
            num_programs, 1, 1, stream, self._function, self._metadata, None, None, None,
            self._source, target, ids, scratch, num_pages, counters, index, count, self._arrived, self._lock, times,
            self._finished, self._turns.after(num_programs, self._shape),
            self._page_words, self._rows, self._words, IDS_AT_ONCE, self._has_clock,
        )  # fmt: skip
        self._turns.launched(num_programs)


@triton.jit(do_not_specialize=["num_pages", "index", "count", "after"])
def _push_kernel(
    source, target, ids, scratch, num_pages, counters, index, count, arrived, lock, times, finished, after,
    PAGE_WORDS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, IDS: tl.constexpr, HAS_CLOCK: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) == 0:
        tl.store(times, _now(HAS_CLOCK))
    parts: tl.constexpr = (PAGE_WORDS + WORDS - 1) // WORDS
    num_tiles = tl.cdiv(num_pages, ROWS) * parts
    share = tl.cdiv(num_tiles, tl.num_programs(0))
    first = tl.program_id(0) * share
    end = tl.minimum(first + share, num_tiles)
    last = tl.minimum(tl.cdiv(end, parts) * ROWS, num_pages)           # its pages end here: it knows no ids beyond
    _fetch_ids(ids, scratch, num_pages, first // parts * ROWS, last, IDS)
    src, dst = _ids(scratch, num_pages, last, first, parts, ROWS)
    words = _load(source, src, last, first, parts, PAGE_WORDS, ROWS, WORDS)
    next_src, next_dst = _ids(scratch, num_pages, last, first + 1, parts, ROWS)
    while tl.load(finished, volatile=True) - after < 0:                # not `<`: they are modulo 2^32
        pass
    for tile in range(first, end):
        next_words = _load(source, next_src, last, tile + 1, parts, PAGE_WORDS, ROWS, WORDS)
        later_src, later_dst = _ids(scratch, num_pages, last, tile + 2, parts, ROWS)
        places, there = _places(target, dst, last, tile, parts, PAGE_WORDS, ROWS, WORDS)
        tl.store(places, words, mask=there)
        words, dst = next_words, next_dst
        next_src, next_dst = later_src, later_dst
    tl.debug_barrier()
    tl.atomic_add(finished, 1, sem="relaxed", scope="gpu")
    if tl.atomic_add(arrived, 1, sem="acq_rel", scope="sys") == tl.num_programs(0) - 1:
        tl.store(arrived, 0)
        while tl.atomic_cas(lock, 0, 1, sem="acq_rel", scope="gpu") != 0:
            pass
        counter = counters + index
        tl.store(counter, tl.load(counter, volatile=True) + count, cache_modifier=".wt")
        tl.atomic_xchg(lock, 0, sem="acq_rel", scope="sys")
        tl.store(times + 1, _now(HAS_CLOCK), cache_modifier=".wt")


@triton.jit
def _now(HAS_CLOCK: tl.constexpr):
    if HAS_CLOCK:
        return globaltimer()
    return tl.full((), 1, tl.int64)


@triton.jit
def _fetch_ids(ids, scratch, num_pages, begin, last, IDS: tl.constexpr):
    """Both sides' ids of pages `begin` to `last`, from `ids` into `scratch`; the program's threads have them when it returns."""
    for start in range(begin, last, IDS):
        at = start + tl.arange(0, IDS)
        here = tl.load(ids + at, mask=at < last)
        there = tl.load(ids + num_pages + at, mask=at < last)
        tl.store(scratch + at, here, mask=at < last)
        tl.store(scratch + num_pages + at, there, mask=at < last)
    tl.debug_barrier()


@triton.jit
def _ids(scratch, num_pages, last, tile, parts: tl.constexpr, ROWS: tl.constexpr):
    """The pages of a tile, here and there: [ROWS] each."""
    rows = (tile // parts) * ROWS + tl.arange(0, ROWS)
    there = rows < last
    return tl.load(scratch + rows, mask=there, other=0), tl.load(scratch + num_pages + rows, mask=there, other=0)


@triton.jit
def _places(pool, pages, last, tile, parts: tl.constexpr, PAGE_WORDS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Where a tile's words lie in a pool, and which of them exist: [ROWS, WORDS]."""
    words = (tile % parts) * WORDS + tl.arange(0, WORDS)
    there = ((tile // parts) * ROWS + tl.arange(0, ROWS) < last)[:, None]
    if PAGE_WORDS % WORDS != 0:
        there = there & (words < PAGE_WORDS)[None, :]
    return pool + (pages * PAGE_WORDS)[:, None] + words[None, :], there


@triton.jit
def _load(pool, pages, last, tile, parts: tl.constexpr, PAGE_WORDS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    places, there = _places(pool, pages, last, tile, parts, PAGE_WORDS, ROWS, WORDS)
    return tl.load(places, mask=there, other=0)
