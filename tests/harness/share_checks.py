"""Which program of prefill attention takes which share, against the same in plain Python, on any device."""

import torch
import triton
import triton.language as tl

from diptych.kernels.context_shares import MOST_CHUNK_SHARES, ChunkCut
from diptych.kernels.prefill_shares import sequence_at, share_length

from .kernel_checks import Device


@triton.jit
def _items_kernel(
    found, query_starts, context_lens, num_sequences, room, fewest_keys, CUT_TILES: tl.constexpr, QUERIES: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    share = share_length(query_starts, context_lens, num_sequences, room, fewest_keys, QUERIES, WINDOW)
    sequence, place, part = sequence_at(item, query_starts, context_lens, num_sequences, share, CUT_TILES, QUERIES, WINDOW)
    tl.store(found + 3 * item, sequence)
    tl.store(found + 3 * item + 1, place)
    tl.store(found + 3 * item + 2, part)


def check_items(lengths: list[tuple[int, int]], cut: ChunkCut, queries: int, window: int | None, device: Device) -> list[int]:
    """Each share of each tile is one program's, and no more of those that are merged than there is room for → shares of each tile."""
    contexts = [rows + earlier for rows, earlier in lengths]
    seen = contexts if window is None else [min(context, window + queries) for context in contexts]
    tiles = [0 if rows == 1 else -(-rows // queries) for rows, _ in lengths]
    length = max(cut.fewest_keys, -(-sum(count * keys for count, keys in zip(tiles, seen, strict=True)) // cut.room))
    shares = [max(1, min(keys // length, MOST_CHUNK_SHARES)) if count else 0 for count, keys in zip(tiles, seen, strict=True)]
    items, cut_tiles, parts = [], [], 0
    for sequence, (count, of_each) in enumerate(zip(tiles, shares, strict=True)):
        items += [(sequence, place, parts) for place in range(count * of_each)]
        if of_each > 1:
            cut_tiles += [(sequence, place, parts) for place in range(count)]
            parts += count * of_each
    assert parts <= cut.room
    starts = torch.tensor([0] + [rows for rows, _ in lengths]).cumsum(0).to(device.name, torch.int32)
    lens = torch.tensor(contexts, dtype=torch.int32, device=device.name)
    for of_cut_tiles, expected in ((False, items), (True, cut_tiles)):
        found = torch.empty(len(expected) + 2, 3, dtype=torch.int32, device=device.name)
        _items_kernel[(len(found),)](found, starts, lens, len(lens), cut.room, cut.fewest_keys, of_cut_tiles, queries, window)
        *real, one, two = map(tuple, found.tolist())
        assert real == expected
        assert min(one[0], two[0]) >= len(lengths), "a program beyond the last item takes one"
    return shares
