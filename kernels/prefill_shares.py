"""Chunks of few tokens against long contexts: the keys of a tile of prefill attention cut into shares, and those merged.

    (KV head, item)      item: a sequence's share of the keys of one tile of its query rows
        │ tile of one share: writes the answer     │ more: partial answers and the logarithms of their softmax's sums
        ▼                                          ▼
      out [T, heads, head_dim]  ◄── merge ── partial [kv_heads, room, ROWS, head_dim], log_sums [kv_heads, room, ROWS], fp32

As for decodes (Flash-Decoding, Dao et al. 2023) the merge is o = Σ 2^(l_i - m) o_i / Σ 2^(l_i - m), m = max l_i. `room` is how many items
of a KV head a GPU computes at once, from shapes alone (`context_shares.py`), so that a CUDA graph can capture a launch. How long a share
is, every program computes from the step's sequences: the keys of all tiles, spread over `room`, but no fewer than `fewest_keys`. A
sequence's tiles are cut into as many shares as its context holds whole ones: so the shares of tiles that are cut are at most `room`, and
a GPU runs them at once. Hence also the memory of `partial`: a tile's accumulator, ROWS · head_dim fp32, for each program that a GPU runs
at once, whatever the step's tokens and contexts: 8.3 MiB for 132 SMs and head_dim 128. Programs beyond the last item return at once.

A share is a whole number of steps of the tile's loop; the last one has the keys on the diagonal, too. Short sequences beside have one.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from .context_shares import MOST_CHUNK_SHARES
from .overlap import after_predecessor

MERGED_ROWS = 4             # of a tile, by a program of the merge

_MERGED_ROWS = tl.constexpr(MERGED_ROWS)
_AT_ONCE = tl.constexpr(8)                          # shares that a program of the merge has in flight
_MOST_SHARES = tl.constexpr(MOST_CHUNK_SHARES)
_SEQUENCES = tl.constexpr(128)                      # that are looked at in one step


@triton.jit
def tile_rows(kv_head, first_row, first_query, num_queries, earlier, QUERIES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Of each row of a tile: its row of `out`, head, position, and whether it is a query's at all. `earlier`: tokens before the chunk."""
    places = tl.arange(0, ROWS)
    queries = first_query + places // GROUP
    rows = (first_row + queries).to(tl.int64)
    return rows, kv_head * GROUP + places % GROUP, earlier + queries, (places < QUERIES * GROUP) & (queries < num_queries)


@triton.jit
def tile_keys(first_query, num_queries, earlier, QUERIES: tl.constexpr, WINDOW: tl.constexpr, UNIT: tl.constexpr):
    """The first key that a row of a tile sees and the first that not all are known to see, both multiples of UNIT, and the end."""
    first_position = earlier + first_query
    end = tl.minimum(first_position + QUERIES, earlier + num_queries)
    start = 0
    diagonal = (first_position + 1) // UNIT * UNIT
    if WINDOW is not None:
        start = tl.maximum(first_position + 1 - WINDOW, 0) // UNIT * UNIT
        diagonal = start
    return start, diagonal, end


@triton.jit
def cut_keys(start, diagonal, end, shares, WINDOW: tl.constexpr, UNIT: tl.constexpr):
    """A tile's keys in at most `shares` → the length of each but the last, which also has the diagonal, and how many there are."""
    units = (diagonal - start) // UNIT
    if WINDOW is not None:
        units = tl.cdiv(end - start, UNIT)
    share = tl.maximum(tl.cdiv(units, shares), 1)
    return share * UNIT, tl.maximum(tl.cdiv(units, share), 1)


@triton.jit
def _seen(context, QUERIES: tl.constexpr, WINDOW: tl.constexpr):
    """About how many keys each tile of a sequence has."""
    if WINDOW is not None:
        context = tl.minimum(context, WINDOW + QUERIES)
    return context


@triton.jit
def shares_of(context, share, QUERIES: tl.constexpr, WINDOW: tl.constexpr):
    """Of a sequence's tiles each. Rounded down: with more shares than `room` a GPU would have to come back for the last ones."""
    return tl.minimum(tl.maximum(_seen(context, QUERIES, WINDOW) // share, 1), _MOST_SHARES)


@triton.jit
def _tiles_and_contexts(first, query_starts, context_lens, num_sequences, QUERIES: tl.constexpr):
    """Of the sequences first, first + 1, …: none where there are none, or one row."""
    at = first + tl.arange(0, _SEQUENCES)
    there = at < num_sequences
    rows = tl.load(query_starts + at + 1, mask=there, other=0) - tl.load(query_starts + at, mask=there, other=0)
    return tl.where(rows > 1, tl.cdiv(rows, QUERIES), 0), tl.load(context_lens + at, mask=there, other=0)


@triton.jit
def share_length(
    query_starts, context_lens, num_sequences, room, fewest_keys, QUERIES: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """About how many keys a share has."""
    total = 0
    for first in range(0, num_sequences, _SEQUENCES):
        tiles, contexts = _tiles_and_contexts(first, query_starts, context_lens, num_sequences, QUERIES)
        total += tl.sum(tiles * _seen(contexts, QUERIES, WINDOW))
    return tl.maximum(tl.cdiv(total, room), fewest_keys)


@triton.jit
def sequence_at(
    place, query_starts, context_lens, num_sequences, share, CUT_TILES: tl.constexpr, QUERIES: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """The sequence with the place-th item of all, or with CUT_TILES with the place-th tile of those that are cut; `num_sequences` or more
    if there are not so many. Also its place within the sequence, and how many items of tiles that are cut come before the sequence's.
    """
    sequence = 0
    begins = 0
    parts = 0
    counted = 0
    for first in range(0, num_sequences, _SEQUENCES):
        tiles, contexts = _tiles_and_contexts(first, query_starts, context_lens, num_sequences, QUERIES)
        shares = shares_of(contexts, share, QUERIES, WINDOW)
        counts = tl.where(shares > 1, tiles, 0) if CUT_TILES else tiles * shares
        ends = counted + tl.cumsum(counts, 0)
        passed = ends <= place
        sequence += tl.sum(passed.to(tl.int32))
        begins = tl.maximum(begins, tl.max(tl.where(passed, ends, 0)))
        parts += tl.sum(tl.where(passed & (shares > 1), tiles * shares, 0))
        counted += tl.sum(counts)
    return sequence, place - begins, parts


@triton.jit(do_not_specialize=["num_sequences", "room", "fewest_keys"])
def merge_shares(
    out, partial, log_sums, query_starts, context_lens, num_sequences, room, fewest_keys, out_row_stride, out_head_stride,
    QUERIES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr, UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (KV head, room // 2, ROWS // MERGED_ROWS): a tile that is cut has two shares at least."""
    after_predecessor(PDL)
    kv_head = tl.program_id(0)
    share = share_length(query_starts, context_lens, num_sequences, room, fewest_keys, QUERIES, WINDOW)
    sequence, place, part = sequence_at(tl.program_id(1), query_starts, context_lens, num_sequences, share, True, QUERIES, WINDOW)
    if sequence >= num_sequences:
        return
    first_row = tl.load(query_starts + sequence)
    num_queries = tl.load(query_starts + sequence + 1) - first_row
    context = tl.load(context_lens + sequence)
    num_tiles = tl.cdiv(num_queries, QUERIES)
    first_query = (num_tiles - 1 - place) * QUERIES
    start, diagonal, end = tile_keys(first_query, num_queries, context - num_queries, QUERIES, WINDOW, UNIT)
    _, shares = cut_keys(start, diagonal, end, shares_of(context, share, QUERIES, WINDOW), WINDOW, UNIT)
    if shares == 1:
        return

    places = tl.program_id(2) * _MERGED_ROWS + tl.arange(0, _MERGED_ROWS)
    queries = first_query + places // GROUP
    stored = (places < QUERIES * GROUP) & (queries < num_queries)
    columns = tl.arange(0, WIDTH)
    first_rows = (kv_head * room + part + place) * ROWS + places                # of the tile's first share
    splits = tl.arange(0, _MOST_SHARES)
    logs = tl.load(
        log_sums + first_rows[:, None] + (splits * num_tiles * ROWS)[None, :], mask=stored[:, None] & (splits < shares)[None, :],
        other=float("-inf"),
    )  # fmt: skip
    top = tl.where(stored, tl.max(logs, 1), 0.0)
    total = tl.where(stored, tl.sum(tl.exp2(logs - top[:, None]), 1), 1.0)
    answer = tl.zeros([_MERGED_ROWS, WIDTH], tl.float32)
    for first in range(0, shares, _AT_ONCE):
        some = first + tl.arange(0, _AT_ONCE)
        some_rows = first_rows[:, None] + (some * num_tiles * ROWS)[None, :]
        there = stored[:, None] & (some < shares)[None, :]
        weights = tl.exp2(tl.load(log_sums + some_rows, mask=there, other=float("-inf")) - top[:, None])
        part_there = there[:, :, None] & (columns < HEAD_DIM)[None, None, :]
        parts = tl.load(partial + some_rows[:, :, None] * HEAD_DIM + columns[None, None, :], mask=part_there, other=0.0)
        answer += tl.sum(parts * weights[:, :, None], 1)
    answer /= total[:, None]
    rows = (first_row + queries).to(tl.int64)
    targets = out + (rows * out_row_stride + (kv_head * GROUP + places % GROUP) * out_head_stride)[:, None] + columns[None, :]
    tl.store(targets, answer.to(out.dtype.element_ty), mask=stored[:, None] & (columns < HEAD_DIM)[None, :])
