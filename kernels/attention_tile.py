"""What both attention kernels do with one tile of keys: find its pages, score it, fold it into the running softmax.

The online softmax is that of FlashAttention-2 (arXiv 2307.08691, algorithm 1) with exponentials of base 2. Query heads that share a
KV head are rows of one query tile, so that every key and value is read once for all of them (as Flash-Decoding does for GQA).

Keys and values come from the pool [num_blocks, num_layers, 2, kv_heads, block_size, head_dim]. A kernel is given the pool from its
layer on and steps whole blocks with 64-bit offsets: a pool has more than 2^31 elements.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit
def page_rows(table, start, end, block_stride, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Offsets [TILE] int64, from one head's place in block 0, of the keys start, start + 1, …; those from `end` on are nobody's.

    `start` is a multiple of TILE and less than `end`; the block table is not read past `end`.
    """
    if BLOCK_SIZE % TILE == 0:      # one page holds the tile
        block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
        rows = block * block_stride + (start % BLOCK_SIZE + tl.arange(0, TILE)) * HEAD_DIM
    else:
        positions = start + tl.arange(0, TILE)
        blocks = tl.load(table + positions // BLOCK_SIZE, mask=positions < end, other=0).to(tl.int64)
        rows = blocks * block_stride + (positions % BLOCK_SIZE) * HEAD_DIM
    return rows


@triton.jit
def attend_tile(
    q, accumulator, row_max, row_sum,               # [ROWS, WIDTH] of q's type; [ROWS, WIDTH], [ROWS], [ROWS] fp32
    positions, start, end, table, keys, value_offset, block_stride, scale,
    MASKED: tl.constexpr, WINDOW: tl.constexpr,
    TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Folds the keys start … start + TILE - 1, as far as they lie before `end`, into the running softmax → its new state.

    positions [ROWS]: each row's place in its sequence. keys: where the KV head's keys lie in block 0; its values lie `value_offset`
    further on. scale: of the scores, times log2(e). Without MASKED every key of the tile is there and every row sees it.
    """
    columns = tl.arange(0, WIDTH)
    pointers = keys + page_rows(table, start, end, block_stride, TILE, BLOCK_SIZE, HEAD_DIM)[:, None] + columns[None, :]
    at = start + tl.arange(0, TILE)
    if MASKED or WIDTH != HEAD_DIM:
        # What lies past the context was never written: it may be NaN, and zero times NaN is NaN.
        there = (at < end)[:, None] & (columns < HEAD_DIM)[None, :]
        key_tile = tl.load(pointers, mask=there, other=0.0).to(q.dtype)
        value_tile = tl.load(pointers + value_offset, mask=there, other=0.0).to(q.dtype)
    else:
        key_tile = tl.load(pointers).to(q.dtype)
        value_tile = tl.load(pointers + value_offset).to(q.dtype)
    scores = tl.dot(q, tl.trans(key_tile), input_precision="ieee") * scale
    if MASKED:
        distance = positions[:, None] - at[None, :]
        visible = (distance >= 0) & (at < end)[None, :]
        if WINDOW is not None:
            visible = visible & (distance < WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    anchor = tl.where(new_max == float("-inf"), 0.0, new_max)       # a row that has seen no key yet: exp2(-inf - 0) is 0, not NaN
    weights = tl.exp2(scores - anchor[:, None])
    decay = tl.exp2(row_max - anchor)
    accumulator = tl.dot(weights.to(q.dtype), value_tile, accumulator * decay[:, None], input_precision="ieee")
    return accumulator, new_max, row_sum * decay + tl.sum(weights, 1)
