"""From one small upload, all inputs of a decode step: what a CUDA graph reads in place of arguments.

    upload, int32: a column of B for each of HEADER, then the block ids of all rows, one row after another
        │  one program a row
        ▼
    token_ids, positions, slots, context_lens, block_tables

A row's token is in the upload, or still on the device: `source` is its row in the step before. A row of context 0 is padding: slot -1.
What was sampled may lie in another GPU's memory that this one reaches.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl
from torch import Tensor

from .ops import Paging
from .overlap import after_predecessor, overlapping

WHOLE = ("context", "source", "token", "offset", "top_k")
REAL = ("temperature", "top_p", "min_p", "fraction")
HEADER = (*WHOLE, *REAL, "share")
"""Columns. `source` is -1 for a token that is given; `offset` is where the row's block ids begin after the header. The next five are
what sampling reads; those of REAL are the bits of fp32 numbers. `share` is Paging.share_tokens, in every row."""

TILE = 256


def decode_inputs(
    token_ids: Tensor, positions: Tensor, slots: Tensor, paging: Paging, upload: Tensor, sampled: Tensor, block_size: int
) -> None:
    """Writes token_ids, positions, slots [B] int64, paging.context_lens [B] and paging.block_tables [B, max_blocks] (as far as the
    context reaches). upload: int32, of at least len(HEADER) · B elements and all block ids. sampled [≥ rows of the step before] int64.
    """
    _inputs_kernel[(len(token_ids),)](
        token_ids, positions, slots, paging.context_lens, paging.block_tables, upload, sampled, paging.block_tables.stride(0),
        BLOCK_SIZE=block_size, COLUMNS=len(HEADER), TILE=TILE, num_warps=4, **overlapping(),
    )  # fmt: skip


def fetch_pending(token_ids: Tensor, rows: Tensor, sources: Tensor, sampled: Tensor) -> None:
    """token_ids[rows[i]] = sampled[sources[i]], or 0 where that is negative: all [n] int64. For steps with prompts."""
    if len(rows):
        _pending_kernel[(triton.cdiv(len(rows), TILE),)](
            token_ids, rows, sources, sampled, len(rows), TILE=TILE, num_warps=4, **overlapping()
        )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _pending_kernel(token_ids, rows, sources, sampled, count, TILE: tl.constexpr, PDL: tl.constexpr):
    after_predecessor(PDL)
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = at < count
    token = tl.load(sampled + tl.load(sources + at, mask=there, other=0), mask=there, other=0)
    tl.store(token_ids + tl.load(rows + at, mask=there, other=0), tl.maximum(token, 0), mask=there)


@triton.jit
def _inputs_kernel(
    token_ids, positions, slots, context_lens, block_tables, upload, sampled, table_stride,
    BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_predecessor(PDL)
    row, rows = tl.program_id(0), tl.num_programs(0)
    context = tl.load(upload + row)
    source = tl.load(upload + rows + row)
    given = tl.load(upload + 2 * rows + row).to(tl.int64)
    blocks = upload + COLUMNS * rows + tl.load(upload + 3 * rows + row)
    there = context > 0
    position = tl.maximum(context - 1, 0)
    token = tl.where(source >= 0, tl.load(sampled + source, mask=source >= 0, other=0), given)
    block = tl.load(blocks + position // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
    tl.store(token_ids + row, tl.maximum(token, 0))       # -1 came of logits that are no numbers: that sequence has ended
    tl.store(positions + row, position.to(tl.int64))
    tl.store(slots + row, tl.where(there, block * BLOCK_SIZE + position % BLOCK_SIZE, -1))
    tl.store(context_lens + row, context)
    table = block_tables + row.to(tl.int64) * table_stride
    num_blocks = tl.cdiv(context, BLOCK_SIZE)
    for start in range(0, num_blocks, TILE):
        at = start + tl.arange(0, TILE)
        tl.store(table + at, tl.load(blocks + at, mask=at < num_blocks, other=0), mask=at < num_blocks)
