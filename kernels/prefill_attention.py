"""Attention of chunks of new tokens over their paged KV: causal, variable lengths, whatever is cached before the chunk included.

A program takes one KV head and QUERIES new tokens of one sequence, times the query heads that share the KV head, as rows of one tile,
and runs FlashAttention-2 (arXiv 2307.08691) over the pages: first the tiles of keys that every row sees, without a mask, then those on
the diagonal. The grid is the most tiles that B sequences of T tokens can need, T // QUERIES + B; a program finds its sequence by
bisecting `query_starts` (as in vLLM's unified Triton attention), so a launch needs no value from the device. Later tiles, which see
more keys, start first: what is left for the grid's tail is short.

Sequences with one query row are passed over: `decode_attention` has them. FLOPs bound a long chunk: 4 · head_dim for each query head
and visible key.

Where a page is a tile (`PrefillTile.page_shape`), `prefill_pages.py` walks them: the pool is then one matrix of rows [head_dim], in
which one head's keys, or values, of a block are block_size adjacent rows: one copy by the tensor memory accelerator (TMA).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention_tile import attend_tile
from .decode_attention import LOG2_E
from .ops import Paging
from .overlap import after_predecessor, overlapping
from .prefill_pages import attend_pages


@dataclass(frozen=True)
class PrefillTile:
    """What is compiled in: rows and keys of a tile, and how Triton runs it."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    pages: int = 0                        # that one step of the loop takes by TMA, `keys` in each; 0: keys come by pointers
    max_registers: int | None = None      # of a thread, where two programs are to share an SM

    @classmethod
    def of(cls, head_dim: int, group: int, element_bytes: int) -> "PrefillTile":
        """The accumulator, rows × head_dim fp32, lives in registers: at most 128 of a thread's 255."""
        at_least = triton.next_power_of_2(group)
        if element_bytes == 4:
            return cls(rows=max(16, at_least), keys=32, num_warps=4, num_stages=1)
        if head_dim > 128:
            return cls(rows=max(128, at_least), keys=32, num_warps=8, num_stages=2)
        return cls(rows=max(128, at_least), keys=64, num_warps=8, num_stages=3)

    @classmethod
    def for_call(cls, q: Tensor, kv_pool: Tensor, window: int | None) -> "PrefillTile":
        """By pages in the case that is worth it, by pointers in every other."""
        group, head_dim = q.shape[1] // kv_pool.shape[3], q.shape[2]
        plain = kv_pool.dtype is q.dtype and q.element_size() == 2 and window is None
        if plain and (head_dim, kv_pool.shape[4]) == (128, 64) and group <= SHORT.rows:
            return LONG if len(q) >= LONG_TOKENS else SHORT
        return cls.of(head_dim, group, q.element_size())


# For head_dim 128, blocks of 64, 16-bit elements: the fastest of tests/bench/prefill_sweep.py on an H200. Few tokens make few tiles, so
# small ones. A limit of 128 registers, for two programs on an SM, is up to 2 % faster still on long prompts, but spills.
SHORT = PrefillTile(rows=64, keys=64, num_warps=4, num_stages=2, pages=1)
LONG = PrefillTile(rows=128, keys=64, num_warps=8, num_stages=3, pages=2)
LONG_TOKENS = 1536


def prefill_attention(
    out: Tensor, q: Tensor, kv_pool: Tensor, layer: int, paging: Paging, scale: float, window: int | None, kv_scales: Tensor | None,
    tile: PrefillTile | None = None,
) -> None:  # fmt: skip
    """Writes the rows of `out` that belong to sequences with several query rows; arguments as `decode_attention` has them.

    `tile` is for measuring; left out, it is the one for these shapes.
    """
    num_tokens, num_heads, head_dim = q.shape
    kv_heads, block_size = kv_pool.shape[3:5]
    num_sequences = len(paging.context_lens)
    group = num_heads // kv_heads
    tile = tile or PrefillTile.for_call(q, kv_pool, window)
    assert not tile.pages or (tile.keys, window, kv_scales) == (block_size, None, None), f"{tile} for pages of {block_size}"
    queries = tile.rows // group
    pages = TensorDescriptor.from_tensor(kv_pool.view(-1, head_dim), [block_size, head_dim]) if tile.pages else None
    _prefill_kernel[(kv_heads, num_tokens // queries + num_sequences)](
        out, q, kv_pool, pages, None if kv_scales is None else kv_scales[layer],
        paging.query_starts, paging.context_lens, paging.block_tables, num_sequences, scale * LOG2_E,
        out.stride(0), out.stride(1), q.stride(0), q.stride(1), paging.block_tables.stride(0), kv_pool.stride(0), layer * kv_pool.stride(1),
        QUERIES=queries, GROUP=group, ROWS=tile.rows, WINDOW=window,
        TILE=tile.keys, BLOCK_SIZE=block_size, HEAD_DIM=head_dim, WIDTH=triton.next_power_of_2(head_dim),
        PAGES=tile.pages,
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.max_registers,
        **overlapping(),
    )  # fmt: skip


@triton.jit
def _sequence_of(tile, query_starts, num_sequences, QUERIES: tl.constexpr):
    """The sequence whose tiles `tile` is among: the last i with query_starts[i] // QUERIES + i <= tile."""
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(query_starts + middle) // QUERIES + middle <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit(do_not_specialize=["num_sequences", "table_stride"])
def _prefill_kernel(
    out, q, kv_pool, pages, kv_scales, query_starts, context_lens, block_tables, num_sequences, scale,
    out_row_stride, out_head_stride, q_row_stride, q_head_stride, table_stride, block_stride, layer_offset,
    QUERIES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr,
    TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    PAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_predecessor(PDL)
    kv_head, kv_heads = tl.program_id(0), tl.num_programs(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    sequence = _sequence_of(tile, query_starts, num_sequences, QUERIES)
    first_row = tl.load(query_starts + sequence)
    num_queries = tl.load(query_starts + sequence + 1) - first_row
    first_query = (tile - first_row // QUERIES - sequence) * QUERIES
    if (num_queries <= 1) | (first_query >= num_queries):
        return
    earlier = tl.load(context_lens + sequence) - num_queries

    places = tl.arange(0, ROWS)
    queries = first_query + places // GROUP
    rows = (first_row + queries).to(tl.int64)
    heads = kv_head * GROUP + places % GROUP
    columns = tl.arange(0, WIDTH)
    stored = ((places < QUERIES * GROUP) & (queries < num_queries))[:, None] & (columns < HEAD_DIM)[None, :]
    query = tl.load(q + (rows * q_row_stride + heads * q_head_stride)[:, None] + columns[None, :], mask=stored, other=0.0)
    value_scale = 1.0
    if kv_scales is not None:
        scale *= tl.load(kv_scales + kv_head)
        value_scale = tl.load(kv_scales + kv_heads + kv_head)

    positions = earlier + queries
    first_position = earlier + first_query
    end = tl.minimum(first_position + QUERIES, earlier + num_queries)       # keys from here on are seen by no row
    start = 0
    diagonal = (first_position + 1) // TILE * TILE                          # keys before are seen by every row
    if WINDOW is not None:
        start = tl.maximum(first_position + 1 - WINDOW, 0) // TILE * TILE
        diagonal = start

    accumulator = tl.zeros([ROWS, WIDTH], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    table = block_tables + sequence.to(tl.int64) * table_stride
    if PAGES:
        first_page_row = ((layer_offset // HEAD_DIM) + kv_head * BLOCK_SIZE).to(tl.int32)
        accumulator, row_sum = attend_pages(
            query, accumulator, row_max, row_sum, positions, end, earlier + num_queries, table, pages,
            first_page_row, (block_stride // HEAD_DIM).to(tl.int32), kv_heads * BLOCK_SIZE, scale,
            first_position, TILE, PAGES,
        )  # fmt: skip
    else:
        keys = kv_pool + layer_offset + kv_head * (BLOCK_SIZE * HEAD_DIM)
        value_offset = kv_heads * (BLOCK_SIZE * HEAD_DIM)
        for at in range(start, diagonal, TILE):
            accumulator, row_max, row_sum = attend_tile(
                query, accumulator, row_max, row_sum, positions, at, end, table, keys, value_offset, block_stride, scale,
                False, WINDOW, TILE, BLOCK_SIZE, HEAD_DIM, WIDTH,
            )  # fmt: skip
        for at in range(diagonal, end, TILE):
            accumulator, row_max, row_sum = attend_tile(
                query, accumulator, row_max, row_sum, positions, at, end, table, keys, value_offset, block_stride, scale,
                True, WINDOW, TILE, BLOCK_SIZE, HEAD_DIM, WIDTH,
            )  # fmt: skip

    answer = accumulator * (value_scale / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
    targets = out + (rows * out_row_stride + heads * out_head_stride)[:, None] + columns[None, :]
    tl.store(targets, answer.to(out.dtype.element_ty), mask=stored)
