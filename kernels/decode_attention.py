"""Attention of sequences with one new token over their paged KV: the kernel that bounds a decode step at long contexts.

    (split, KV head, sequence), one program after the other      each reads its share of the context once, for all heads of the KV head
            │ one share: writes the answer        │ more: partial answers and the logarithm of their softmax's sum
            ▼                                     ▼
          out [T, heads, head_dim]  ◄── merge ── partial [B, heads, splits, head_dim], log_sums [B, heads, splits], fp32

Splitting fills the GPU when there are fewer (sequence, KV head) pairs than it can run, and evens out their contexts (Flash-Decoding,
Dao et al. 2023); the merge is o = Σ 2^(l_i - m) o_i / Σ 2^(l_i - m), m = max l_i. How many splits there can be depends on shapes alone,
so a launch needs no synchronisation and can be captured in a CUDA graph; into how many shares each context is cut, `share_tokens` says,
which the host decides for the step (`context_shares.py`). Of few sequences every share that there can be is an item, and a program takes
several in turn: with a program for each, those that find nothing crowd the others onto a few multiprocessors (b8, context 8192: 14 % of a
step). Of many that would be too many to look at: then those that there are have been listed, once for all layers of the step, of more
than some 32 sequences the longest first; programs take them in laps that run forward and back, so that each multiprocessor gets about as
many keys. Sequences with any other number of query rows are passed over, with context 0 answered with zeros.

    share_list int32: [shares, sequences that are cut, … which those are (B places), … sequence · splits + share of each share]

A decode reads 2 · context · kv_heads · head_dim elements and does 4 · group FLOPs with each, so bytes bound it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tile import attend_tile
from .context_shares import RESIDENT, are_listed, are_sorted, num_programs, resident
from .ops import Paging
from .overlap import after_predecessor, overlapping

LOG2_E = 1.4426950408889634

_SEQUENCES = tl.constexpr(128)              # that are listed in one go
_OTHERS = tl.constexpr(32)                  # with which each of them is compared in one go


@dataclass(frozen=True)
class DecodeTile:
    """What is compiled in: key rows in a tile, and how Triton runs it."""

    keys: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, width: int, element_bytes: int, kv_bytes: int, pairs: int, num_sms: int) -> "DecodeTile":
        """16 KiB of keys and as much of values. Of five stages the block table's load takes three, so two tiles are in flight, and three
        programs fit onto a multiprocessor; with four stages four. Where there is at least one for each, two warps do as well as four.
        Converting fp8 takes the registers of four.
        """
        if element_bytes == 4:
            return cls(keys=32, num_warps=4, num_stages=1)
        if kv_bytes == 1:
            return cls(keys=8192 // width, num_warps=4, num_stages=5)
        stages = 5 if resident(pairs, num_sms) == RESIDENT[0] else 4
        return cls(keys=8192 // width, num_warps=4 if pairs <= num_sms else 2, num_stages=stages)


def decode_attention(
    out: Tensor, q: Tensor, kv_pool: Tensor, layer: int, paging: Paging, scale: float, window: int | None,
    kv_scales: Tensor | None, splits: int, tile: DecodeTile | None = None, num_sms: int = 132,
) -> None:  # fmt: skip
    """Writes the rows of `out` that belong to sequences with one query row. `tile` is for measuring. A `share_list` is of these `splits`.

    out, q [T, heads, head_dim], any row and head stride, head_dim contiguous. kv_pool [num_blocks, num_layers, 2, kv_heads, block_size,
    head_dim], contiguous, of q's type or fp8 e4m3. kv_scales [num_layers, 2, kv_heads] fp32: what the stored keys and values are
    multiplied with, or None for 1.
    """
    _, num_heads, head_dim = q.shape
    kv_heads, block_size = kv_pool.shape[3:5]
    num_sequences = len(paging.context_lens)
    group = num_heads // kv_heads
    width = triton.next_power_of_2(head_dim)
    tile = tile or DecodeTile.of(width, q.element_size(), kv_pool.element_size(), num_sequences * kv_heads, num_sms)
    partial, log_sums = out, out        # not used when there is one split
    if splits > 1:
        partial = torch.empty(num_sequences, num_heads, splits, head_dim, dtype=torch.float32, device=q.device)
        log_sums = torch.empty(num_sequences, num_heads, splits, dtype=torch.float32, device=q.device)
    is_listed = paging.share_list is not None
    _decode_kernel[(num_programs(num_sequences * kv_heads, splits, num_sms, is_listed),)](
        out, partial, log_sums, q, kv_pool, None if kv_scales is None else kv_scales[layer],
        paging.query_starts, paging.context_lens, paging.block_tables, paging.share_tokens, paging.share_list, scale * LOG2_E,
        num_sequences, kv_heads, splits, num_sms,
        out.stride(0), out.stride(1), q.stride(0), q.stride(1), paging.block_tables.stride(0), kv_pool.stride(0), layer * kv_pool.stride(1),
        GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), SPLIT=splits > 1, WINDOW=window,
        TILE=tile.keys, BLOCK_SIZE=block_size, HEAD_DIM=head_dim, WIDTH=width,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **overlapping(),
    )  # fmt: skip
    if splits > 1:
        num_cut = min(num_sequences, triton.cdiv(num_sms, kv_heads)) if is_listed else num_sequences
        _merge_kernel[(num_cut, num_heads)](
            out, partial, log_sums, paging.query_starts, paging.context_lens, paging.share_tokens, paging.share_list, num_sequences,
            out.stride(0), out.stride(1), splits,
            WINDOW=window, TILE=tile.keys, SPLITS=triton.next_power_of_2(splits), HEAD_DIM=head_dim, WIDTH=width, num_warps=4,
            **overlapping(),
        )  # fmt: skip


@triton.jit(do_not_specialize=["table_stride", "num_sequences", "splits", "num_sms"])
def _decode_kernel(
    out, partial, log_sums, q, kv_pool, kv_scales, query_starts, context_lens, block_tables, share_tokens, share_list, scale,
    num_sequences, kv_heads, splits, num_sms,
    out_row_stride, out_head_stride, q_row_stride, q_head_stride, table_stride, block_stride, layer_offset,
    GROUP: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr,
    TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    after_predecessor(PDL)
    pairs = num_sequences * kv_heads
    num_items = pairs * splits
    num_turns = num_items
    if share_list is not None:
        num_items = tl.load(share_list) * kv_heads
        num_turns = tl.cdiv(num_items, num_sms) * num_sms
    for turn in range(tl.program_id(0), num_turns, tl.num_programs(0)):
        item = turn
        if share_list is not None:
            lap = turn // num_sms
            item = tl.where(lap % 2 == 0, turn, (2 * lap + 1) * num_sms - 1 - turn)
            listed = tl.load(share_list + 2 + num_sequences + tl.minimum(item, num_items - 1) // kv_heads)
            split, kv_head, sequence = listed % splits, item % kv_heads, (listed // splits).to(tl.int64)
        else:
            split, kv_head, sequence = item // pairs, item % pairs // num_sequences, (item % num_sequences).to(tl.int64)
        row = tl.load(query_starts + sequence).to(tl.int64)
        num_rows = tl.load(query_starts + sequence + 1) - row
        context = tl.load(context_lens + sequence)
        first, share, shares = _shares(context, splits, share_tokens, WINDOW, TILE)
        # The last lap may have places for more items than there are.
        if (item < num_items) & (num_rows == 1) & (split < shares):
            start = first + split * share
            end = tl.minimum(start + share, context)
            table = block_tables + sequence * table_stride
            keys = kv_pool + layer_offset + kv_head * (BLOCK_SIZE * HEAD_DIM)
            value_offset = kv_heads * (BLOCK_SIZE * HEAD_DIM)
            heads = kv_head * GROUP + tl.arange(0, ROWS)
            columns = tl.arange(0, WIDTH)
            stored = (tl.arange(0, ROWS) < GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
            query = tl.load(q + row * q_row_stride + heads[:, None] * q_head_stride + columns[None, :], mask=stored, other=0.0)
            key_scale, value_scale = scale, 1.0
            if kv_scales is not None:
                key_scale = scale * tl.load(kv_scales + kv_head)
                value_scale = tl.load(kv_scales + kv_heads + kv_head)

            accumulator = tl.zeros([ROWS, WIDTH], tl.float32)
            row_max = tl.full([ROWS], float("-inf"), tl.float32)
            row_sum = tl.zeros([ROWS], tl.float32)
            positions = tl.full([ROWS], context - 1, tl.int32)
            for at in range(start, end, TILE):
                accumulator, row_max, row_sum = attend_tile(
                    query, accumulator, row_max, row_sum, positions, at, end, table, keys, value_offset, block_stride, key_scale,
                    True, WINDOW, TILE, BLOCK_SIZE, HEAD_DIM, WIDTH,
                )  # fmt: skip

            answer = accumulator * (value_scale / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
            if SPLIT and shares > 1:
                places = (sequence * (kv_heads * GROUP) + heads) * splits + split
                tl.store(partial + places[:, None] * HEAD_DIM + columns[None, :], answer, mask=stored)
                tl.store(log_sums + places, row_max + tl.log2(row_sum), mask=tl.arange(0, ROWS) < GROUP)
            else:
                places = row * out_row_stride + heads * out_head_stride
                tl.store(out + places[:, None] + columns[None, :], answer.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _shares(context, splits, share_tokens, WINDOW: tl.constexpr, TILE: tl.constexpr):
    """Where a context's visible keys begin, how long a share of them is, and how many shares there are: only a lone one may be empty."""
    first_tile = 0
    if WINDOW is not None:
        first_tile = tl.maximum(context - WINDOW, 0) // TILE
    shares = splits
    if share_tokens is not None:
        shares = tl.minimum(splits, tl.cdiv(context - first_tile * TILE, tl.load(share_tokens)))
    tiles = tl.cdiv(context, TILE) - first_tile
    share = tl.cdiv(tiles, tl.maximum(shares, 1))
    return first_tile * TILE, share * TILE, tl.maximum(tl.cdiv(tiles, tl.maximum(share, 1)), 1)


@triton.jit(do_not_specialize=["num_sequences", "splits"])
def _merge_kernel(
    out, partial, log_sums, query_starts, context_lens, share_tokens, share_list, num_sequences, out_row_stride, out_head_stride, splits,
    WINDOW: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (sequence, head), for sequences of several shares; with a list, some of those at once."""
    after_predecessor(PDL)
    end = num_sequences
    if share_list is not None:
        end = tl.load(share_list + 1)
    for at in range(tl.program_id(0), end, tl.num_programs(0)):
        sequence = at
        if share_list is not None:
            sequence = tl.load(share_list + 2 + at)
        _merge(out, partial, log_sums, query_starts, context_lens, share_tokens, sequence, out_row_stride, out_head_stride, splits,
               WINDOW, TILE, SPLITS, HEAD_DIM, WIDTH)  # fmt: skip


@triton.jit
def _merge(
    out, partial, log_sums, query_starts, context_lens, share_tokens, sequence, out_row_stride, out_head_stride, splits,
    WINDOW: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    row = tl.load(query_starts + sequence).to(tl.int64)
    num_rows = tl.load(query_starts + sequence + 1) - row
    _, _, shares = _shares(tl.load(context_lens + sequence), splits, share_tokens, WINDOW, TILE)
    if (num_rows == 1) & (shares > 1):
        places = (sequence.to(tl.int64) * num_heads + head) * splits + tl.arange(0, SPLITS)
        logs = tl.load(log_sums + places, mask=tl.arange(0, SPLITS) < shares, other=float("-inf"))
        weights = tl.exp2(logs - tl.max(logs, 0))
        total = tl.sum(weights, 0)
        columns = tl.arange(0, WIDTH)
        there = (logs > float("-inf"))[:, None] & (columns < HEAD_DIM)[None, :]
        parts = tl.load(partial + places[:, None] * HEAD_DIM + columns[None, :], mask=there, other=0.0)
        answer = tl.sum(parts * weights[:, None], 0) / total
        target = out + row * out_row_stride + head * out_head_stride
        tl.store(target + columns, answer.to(out.dtype.element_ty), mask=columns < HEAD_DIM)


def with_share_list(paging: Paging, kv_heads: int, splits: int, num_sms: int) -> Paging:
    """With the list that `decode_attention` of as many splits is to be given, if it pays."""
    num_sequences = len(paging.context_lens)
    if not are_listed(num_sequences * kv_heads, splits, num_sms):
        return paging
    share_list = torch.empty(2 + num_sequences * (1 + splits), dtype=torch.int32, device=paging.context_lens.device)
    _list_kernel[(1,)](
        share_list, paging.query_starts, paging.context_lens, paging.share_tokens, num_sequences, splits,
        SPLITS=triton.next_power_of_2(splits), SORTED=are_sorted(num_sequences * kv_heads, num_sms), num_warps=4, **overlapping(),
    )  # fmt: skip
    return replace(paging, share_list=share_list)


@triton.jit(do_not_specialize=["num_sequences", "splits"])
def _list_kernel(
    share_list, query_starts, context_lens, share_tokens, num_sequences, splits,
    SPLITS: tl.constexpr, SORTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A share that `_shares` finds too short to be one is listed, and passed over where it is looked up."""
    after_predecessor(PDL)
    num_shares = 0
    num_cut = 0
    for first in range(0, num_sequences, _SEQUENCES):
        at = first + tl.arange(0, _SEQUENCES)
        shares, length = _as_listed(query_starts, context_lens, share_tokens, at, num_sequences, splits)
        is_cut = (shares > 1).to(tl.int32)
        tl.store(share_list + 1 + num_cut + tl.cumsum(is_cut, 0), at, mask=is_cut > 0)          # its place counts from 1
        begins = num_shares + tl.cumsum(shares, 0) - shares
        if SORTED:
            begins = tl.zeros_like(shares)
            for others in range(0, num_sequences, _OTHERS):
                other = others + tl.arange(0, _OTHERS)
                their_shares, their_length = _as_listed(query_starts, context_lens, share_tokens, other, num_sequences, splits)
                is_alike, is_earlier = their_length[None, :] == length[:, None], other[None, :] < at[:, None]
                is_before = (their_length[None, :] > length[:, None]) | (is_alike & is_earlier)
                begins += tl.sum(tl.where(is_before, their_shares[None, :], 0), 1)
        split = tl.arange(0, SPLITS)[None, :]
        places = share_list + 2 + num_sequences + begins[:, None] + split
        tl.store(places, at[:, None] * splits + split, mask=split < shares[:, None])
        num_shares += tl.sum(shares)
        num_cut += tl.sum(is_cut)
    tl.store(share_list, num_shares)
    tl.store(share_list + 1, num_cut)


@triton.jit
def _as_listed(query_starts, context_lens, share_tokens, at, num_sequences, splits):
    """Into how many shares sequences `at` are cut, those of other than one query row into none; and how long their shares are."""
    there = at < num_sequences
    rows = tl.load(query_starts + at + 1, mask=there, other=0) - tl.load(query_starts + at, mask=there, other=0)
    contexts = tl.load(context_lens + at, mask=there, other=0)
    shares = tl.zeros_like(rows) + splits
    if share_tokens is not None:
        shares = tl.minimum(splits, tl.maximum(tl.cdiv(contexts, tl.load(share_tokens)), 1))
    return tl.where(rows == 1, shares, 0), contexts // shares
