"""Prefill attention's way through a sequence whose pages are tiles: each page's keys and values come with one TMA copy.

    pages that every row sees, PAGES of them a step, without a mask   →   the pages on the diagonal, one a step, masked

A page's place is read from the block table one step ahead: otherwise each copy would wait for that load. The maximum is taken of raw
scores and the scale goes into one multiply-add before the exponential. No window, and a page that every row sees comes first, if only
the context's first key is seen by all: so no row's maximum is ever -inf.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit
def attend_pages(
    query, accumulator, row_max, row_sum, positions, start, diagonal, end, context, table, pages, first_row, block_rows, value_rows, scale,
    PAGE: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """→ the accumulator, the rows' maxima and their sums of weights, after the keys start … end - 1.

    Every row sees the keys before `diagonal`; `start` and `diagonal` are multiples of PAGE * PAGES, and equal only if both are 0.
    pages: the pool as rows; first_row: of the KV head's keys in block 0; block_rows: from a block to the next; value_rows: from keys
    to their values.
    """
    last = tl.maximum(end - 1, 0) // PAGE
    block = tl.load(table + start // PAGE)
    if PAGES == 1:
        for at in tl.range(start, diagonal, PAGE):
            row = first_row + block * block_rows
            block = tl.load(table + tl.minimum(at // PAGE + 1, last))
            keys = pages.load([row, 0])
            scores = tl.dot(query, keys.T)
            new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
            weights = tl.exp2(scores * scale - new_max[:, None])
            decay = tl.exp2(row_max - new_max)
            values = pages.load([row + value_rows, 0])
            accumulator = tl.dot(weights.to(query.dtype), values, accumulator * decay[:, None])
            row_sum = row_sum * decay + tl.sum(weights, 1)
            row_max = new_max
    else:
        second = tl.load(table + tl.minimum(start // PAGE + 1, last))
        for at in tl.range(start, diagonal, 2 * PAGE):
            row, second_row = first_row + block * block_rows, first_row + second * block_rows
            block = tl.load(table + tl.minimum(at // PAGE + 2, last))
            second = tl.load(table + tl.minimum(at // PAGE + 3, last))
            scores = tl.dot(query, pages.load([row, 0]).T)
            second_scores = tl.dot(query, pages.load([second_row, 0]).T)
            new_max = tl.maximum(row_max, tl.max(tl.maximum(scores, second_scores), 1) * scale)
            weights = tl.exp2(scores * scale - new_max[:, None])
            second_weights = tl.exp2(second_scores * scale - new_max[:, None])
            decay = tl.exp2(row_max - new_max)
            accumulator = tl.dot(weights.to(query.dtype), pages.load([row + value_rows, 0]), accumulator * decay[:, None])
            accumulator = tl.dot(second_weights.to(query.dtype), pages.load([second_row + value_rows, 0]), accumulator)
            row_sum = row_sum * decay + tl.sum(weights + second_weights, 1)
            row_max = new_max
    for at in tl.range(diagonal, end, PAGE, num_stages=2):
        row = first_row + block * block_rows
        block = tl.load(table + tl.minimum(at // PAGE + 1, last))
        keys = at + tl.arange(0, PAGE)
        scores = tl.dot(query, pages.load([row, 0]).T)
        visible = (positions[:, None] >= keys[None, :]) & (keys < context)[None, :]
        scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        # What lies past the context was never written: it may be NaN, and zero times NaN is NaN.
        values = tl.where((keys < context)[:, None], pages.load([row + value_rows, 0]), 0.0)
        accumulator = tl.dot(weights.to(query.dtype), values, accumulator * decay[:, None])
        row_sum = row_sum * decay + tl.sum(weights, 1)
        row_max = new_max
    return accumulator, row_max, row_sum
