"""Attention of chunks of new tokens over their paged KV: causal, variable lengths, whatever is cached before the chunk included.

A program takes one KV head and QUERIES new tokens of one sequence, times the query heads that share the KV head, as rows of one tile,
and runs FlashAttention-2 (arXiv 2307.08691) over the pages: first the tiles of keys that every row sees, without a mask, then those on
the diagonal. The grid is the most tiles that B sequences of T tokens can need, T // QUERIES + B; a program finds its sequence by
bisecting `query_starts` (as in vLLM's unified Triton attention), so a launch needs no value from the device. Later tiles, which see
more keys, start first: what is left for the grid's tail is short.

A step of few tokens makes few tiles, each of which would walk a long context alone. There the keys of a tile are cut into shares, items of
a second kernel, and what comes of them is merged (`prefill_shares.py`).

Sequences with one query row are passed over: `decode_attention` has them. FLOPs bound a long chunk: 4 · head_dim for each query head
and visible key.

Where a page is a tile (`PrefillTile.page_shape`), `prefill_pages.py` walks them: the pool is then one matrix of rows [head_dim], in
which one head's keys, or values, of a block are block_size adjacent rows: one copy by the tensor memory accelerator (TMA).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention_tile import attend_tile
from .context_shares import ChunkCut, chunk_cut
from .decode_attention import LOG2_E
from .ops import Paging
from .overlap import after_predecessor, overlapping
from .prefill_pages import attend_pages
from .prefill_shares import (
    MERGED_ROWS,
    cut_keys,
    merge_shares,
    sequence_at,
    share_length,
    shares_of,
    tile_keys,
    tile_rows,
)


@dataclass(frozen=True)
class PrefillTile:
    """What is compiled in: rows and keys of a tile, and how Triton runs it."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    pages: int = 0                        # that one step of the loop takes by TMA, `keys` in each; 0: keys come by pointers
    max_registers: int | None = None      # of a thread, where two programs are to share an SM
    resident: int = 1                     # programs that an SM has at once

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
SHORT = PrefillTile(rows=64, keys=64, num_warps=4, num_stages=2, pages=1, resident=2)
LONG = PrefillTile(rows=128, keys=64, num_warps=8, num_stages=3, pages=2)
LONG_TOKENS = 1536


def prefill_attention(
    out: Tensor, q: Tensor, kv_pool: Tensor, layer: int, paging: Paging, scale: float, window: int | None, kv_scales: Tensor | None,
    tile: PrefillTile | None = None, cut: ChunkCut | None = None, num_sms: int = 132,
) -> None:  # fmt: skip
    """Writes the rows of `out` that belong to sequences with several query rows; arguments as `decode_attention` has them.

    `tile` and `cut` are for measuring; left out, they are those for these shapes.
    """
    num_tokens, num_heads, head_dim = q.shape
    kv_heads, block_size = kv_pool.shape[3:5]
    num_sequences = len(paging.context_lens)
    group = num_heads // kv_heads
    tile = tile or PrefillTile.for_call(q, kv_pool, window)
    assert not tile.pages or (tile.keys, window, kv_scales) == (block_size, None, None), f"{tile} for pages of {block_size}"
    queries = tile.rows // group
    most_tiles = num_tokens // queries + num_sequences
    cut = cut or _cut_for(num_tokens, queries, kv_heads, block_size, paging, window, tile.resident * num_sms)
    pages = TensorDescriptor.from_tensor(kv_pool.view(-1, head_dim), [block_size, head_dim]) if tile.pages else None
    inputs = (
        q, kv_pool, pages, None if kv_scales is None else kv_scales[layer],
        paging.query_starts, paging.context_lens, paging.block_tables, num_sequences,
    )  # fmt: skip
    strides = (
        out.stride(0), out.stride(1), q.stride(0), q.stride(1), paging.block_tables.stride(0), kv_pool.stride(0), layer * kv_pool.stride(1),
    )  # fmt: skip
    width = triton.next_power_of_2(head_dim)
    compiled = {
        "QUERIES": queries, "GROUP": group, "ROWS": tile.rows, "WINDOW": window,
        "TILE": tile.keys, "BLOCK_SIZE": block_size, "HEAD_DIM": head_dim, "WIDTH": width, "PAGES": tile.pages,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages, "maxnreg": tile.max_registers,
    }  # fmt: skip
    if cut.room < 2:
        _prefill_kernel[(kv_heads, most_tiles)](out, *inputs, scale * LOG2_E, *strides, **compiled, **overlapping())
        return
    partial = torch.empty(kv_heads, cut.room, tile.rows, head_dim, dtype=torch.float32, device=q.device)
    log_sums = torch.empty(kv_heads, cut.room, tile.rows, dtype=torch.float32, device=q.device)
    _share_kernel[(kv_heads, cut.room + most_tiles)](
        out, partial, log_sums, *inputs, cut.room, cut.fewest_keys, scale * LOG2_E, *strides, **compiled, **overlapping()
    )
    merge_shares[(kv_heads, cut.room // 2, tile.rows // MERGED_ROWS)](
        out, partial, log_sums, paging.query_starts, paging.context_lens, num_sequences, cut.room, cut.fewest_keys, *strides[:2],
        QUERIES=queries, GROUP=group, ROWS=tile.rows, WINDOW=window, UNIT=tile.keys * max(tile.pages, 1), HEAD_DIM=head_dim, WIDTH=width,
        num_warps=4, **overlapping(),
    )  # fmt: skip


def _cut_for(num_tokens: int, queries: int, kv_heads: int, block_size: int, paging: Paging, window: int | None, programs: int) -> ChunkCut:
    """From shapes alone. Beside single rows a chunk may be as short as the sequences leave it."""
    chunk = num_tokens - (len(paging.context_lens) - 1 if paging.has_single_rows else 0)
    context = num_tokens if paging.is_whole_prompt else paging.block_tables.shape[1] * block_size
    context = context if window is None else min(context, window)
    return chunk_cut(triton.cdiv(chunk, queries), kv_heads, context, programs) if num_tokens < LONG_TOKENS else ChunkCut(0)


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
    """Grid (KV head, tile)."""
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

    rows, heads, positions, stored = tile_rows(kv_head, first_row, first_query, num_queries, earlier, QUERIES, GROUP, ROWS)
    start, diagonal, end = tile_keys(first_query, num_queries, earlier, QUERIES, WINDOW, TILE * max(PAGES, 1))
    answer, _ = _attend(
        q, kv_pool, pages, kv_scales, block_tables + sequence.to(tl.int64) * table_stride, scale,
        q_row_stride, q_head_stride, block_stride, layer_offset,
        kv_head, kv_heads, rows, heads, positions, stored, start, diagonal, end, earlier + num_queries,
        ROWS, WINDOW, TILE, BLOCK_SIZE, HEAD_DIM, WIDTH, PAGES,
    )  # fmt: skip
    columns = tl.arange(0, WIDTH)
    targets = out + (rows * out_row_stride + heads * out_head_stride)[:, None] + columns[None, :]
    tl.store(targets, answer.to(out.dtype.element_ty), mask=stored[:, None] & (columns < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["num_sequences", "table_stride", "room", "fewest_keys"])
def _share_kernel(
    out, partial, log_sums, q, kv_pool, pages, kv_scales, query_starts, context_lens, block_tables, num_sequences, room, fewest_keys, scale,
    out_row_stride, out_head_stride, q_row_stride, q_head_stride, table_stride, block_stride, layer_offset,
    QUERIES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr,
    TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    PAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (KV head, item): the same by shares of a tile's keys; those of tiles with several go to `partial` and `log_sums`."""
    after_predecessor(PDL)
    kv_head, kv_heads = tl.program_id(0), tl.num_programs(0)
    share = share_length(query_starts, context_lens, num_sequences, room, fewest_keys, QUERIES, WINDOW)
    sequence, place, part = sequence_at(tl.program_id(1), query_starts, context_lens, num_sequences, share, False, QUERIES, WINDOW)
    if sequence >= num_sequences:
        return
    first_row = tl.load(query_starts + sequence)
    num_queries = tl.load(query_starts + sequence + 1) - first_row
    context = tl.load(context_lens + sequence)
    earlier = context - num_queries
    num_tiles = tl.cdiv(num_queries, QUERIES)
    split, first_query = place // num_tiles, (num_tiles - 1 - place % num_tiles) * QUERIES
    start, diagonal, end = tile_keys(first_query, num_queries, earlier, QUERIES, WINDOW, TILE * max(PAGES, 1))
    length, shares = cut_keys(start, diagonal, end, shares_of(context, share, QUERIES, WINDOW), WINDOW, TILE * max(PAGES, 1))
    if split >= shares:
        return
    start += split * length
    if split < shares - 1:
        diagonal = start + length
        end = diagonal
    if WINDOW is not None:
        diagonal = start

    rows, heads, positions, stored = tile_rows(kv_head, first_row, first_query, num_queries, earlier, QUERIES, GROUP, ROWS)
    answer, logs = _attend(
        q, kv_pool, pages, kv_scales, block_tables + sequence.to(tl.int64) * table_stride, scale,
        q_row_stride, q_head_stride, block_stride, layer_offset,
        kv_head, kv_heads, rows, heads, positions, stored, start, diagonal, end, context,
        ROWS, WINDOW, TILE, BLOCK_SIZE, HEAD_DIM, WIDTH, PAGES,
    )  # fmt: skip
    columns = tl.arange(0, WIDTH)
    there = stored[:, None] & (columns < HEAD_DIM)[None, :]
    if shares == 1:
        targets = out + (rows * out_row_stride + heads * out_head_stride)[:, None] + columns[None, :]
        tl.store(targets, answer.to(out.dtype.element_ty), mask=there)
    else:
        parts = (kv_head * room + part + place) * ROWS + tl.arange(0, ROWS)
        tl.store(partial + parts[:, None] * HEAD_DIM + columns[None, :], answer, mask=there)
        tl.store(log_sums + parts, logs, mask=stored)


@triton.jit
def _attend(
    q, kv_pool, pages, kv_scales, table, scale, q_row_stride, q_head_stride, block_stride, layer_offset,
    kv_head, kv_heads, rows, heads, positions, stored, start, diagonal, end, context,
    ROWS: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    PAGES: tl.constexpr,
):  # fmt: skip
    """Attention of a tile to the keys start … end - 1 → [ROWS, WIDTH] fp32, and the logarithm (of base 2) of each row's sum of weights.

    Keys before `diagonal` are seen by every row. `start` and `diagonal` lie on borders of tiles.
    """
    columns = tl.arange(0, WIDTH)
    there = stored[:, None] & (columns < HEAD_DIM)[None, :]
    query = tl.load(q + (rows * q_row_stride + heads * q_head_stride)[:, None] + columns[None, :], mask=there, other=0.0)
    value_scale = 1.0
    if kv_scales is not None:
        scale *= tl.load(kv_scales + kv_head)
        value_scale = tl.load(kv_scales + kv_heads + kv_head)

    accumulator = tl.zeros([ROWS, WIDTH], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    if PAGES:
        first_page_row = ((layer_offset // HEAD_DIM) + kv_head * BLOCK_SIZE).to(tl.int32)
        accumulator, row_max, row_sum = attend_pages(
            query, accumulator, row_max, row_sum, positions, start, diagonal, end, context, table, pages,
            first_page_row, (block_stride // HEAD_DIM).to(tl.int32), kv_heads * BLOCK_SIZE, scale,
            TILE, PAGES,
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
    return answer, row_max + tl.log2(row_sum)
