"""How contexts are cut for decode attention, and when for chunks, for the multiprocessors of an H200."""

import math

from hypothesis import given
from hypothesis import strategies as st

from diptych.kernels.context_shares import (
    FEWEST_KEYS,
    FEWEST_TOKENS,
    MOST_LISTED,
    MOST_PARTS,
    UNEVEN,
    are_listed,
    chunk_cut,
    most_shares,
    num_programs,
    resident,
    share_tokens,
)

SMS = 132
CONTEXTS = st.lists(st.integers(1, 131_072), min_size=1, max_size=256)


def cut(contexts: list[int], kv_heads: int) -> list[int]:
    """Shares of each context, as the kernel counts them but for tiles."""
    most, share = most_shares(len(contexts), kv_heads, 131_072, SMS), share_tokens(contexts, kv_heads, SMS)
    return [min(most, math.ceil(context / share)) for context in contexts]


@given(contexts=CONTEXTS, kv_heads=st.integers(1, 32))
def test_every_context_has_a_share_and_none_has_more_than_the_grid(contexts: list[int], kv_heads: int) -> None:
    pairs, shares, most = len(contexts) * kv_heads, cut(contexts, kv_heads), most_shares(len(contexts), kv_heads, 131_072, SMS)
    assert all(1 <= count <= most for count in shares)
    assert pairs * most <= (MOST_PARTS * SMS if are_listed(pairs, most, SMS) else 4 * max(SMS, pairs))


@given(num_sequences=st.integers(1, 512), kv_heads=st.integers(1, 32), max_context=st.integers(1, 131_072))
def test_short_contexts_are_not_cut_into_crumbs(num_sequences: int, kv_heads: int, max_context: int) -> None:
    most = most_shares(num_sequences, kv_heads, max_context, SMS)
    assert most == 1 or max_context // most >= FEWEST_TOKENS


@given(contexts=CONTEXTS)
def test_longer_contexts_have_no_fewer_shares(contexts: list[int]) -> None:
    shares = [count for _, count in sorted(zip(contexts, cut(contexts, 8), strict=True))]
    assert shares == sorted(shares)


def test_one_sequence_fills_the_gpu() -> None:
    assert 0.8 * SMS <= 8 * cut([16_000], 8)[0] <= 3 * SMS


def test_batches_as_measured() -> None:
    """The fastest of what was tried with even contexts, or within 2 % of it."""
    assert [cut([1061] * count, 8)[0] for count in (1, 4, 8, 16, 32, 48, 64, 80, 96, 128, 256)] == [15, 4, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    assert [resident(8 * count, SMS) for count in (1, 48, 64, 80, 96, 128, 192, 256)] == [3, 3, 4, 3, 3, 4, 3, 4]


def test_one_long_context_among_short_ones_is_cut() -> None:
    *short, long = cut([500] * 31 + [16_000], 8)
    assert (set(short), long) == ({1}, 13)


@given(count=st.integers(17, MOST_LISTED * SMS // 8), even=st.integers(100, 4000), long=st.floats(1.4, 60))
def test_who_is_longer_than_most_is_cut_and_who_is_not_stays_whole(count: int, even: int, long: float) -> None:
    *others, longest = cut([even] * (count - 1) + [int(long * even)], 8)
    assert set(others) == {1}
    assert longest >= min(long / (UNEVEN * (count + long) / count), 8) - 1e-3 or even * long < 2 * FEWEST_TOKENS
    assert longest > 1 or long < 1.5


@given(contexts=st.lists(st.integers(1, 16_384), min_size=1, max_size=MOST_LISTED * SMS // 8))
def test_no_share_takes_much_longer_than_others(contexts: list[int]) -> None:
    """While a context that is not cut could: an eighth of the longest at most, or little more than the mean, or than a multiprocessor's
    part of all keys."""
    longest = max(math.ceil(context / count) for context, count in zip(contexts, cut(contexts, 8), strict=True))
    mean, part = sum(contexts) / len(contexts), sum(contexts) * 8 / SMS
    assert longest <= max(max(contexts) / 8, min(UNEVEN * mean, 1.1 * part)) + 1


@given(num_sequences=st.integers(1, 512), kv_heads=st.integers(1, 32), splits=st.integers(1, 16))
def test_programs_are_all_resident_or_one_for_each_item(num_sequences: int, kv_heads: int, splits: int) -> None:
    pairs = num_sequences * kv_heads
    is_listed = are_listed(pairs, splits, SMS)
    programs = num_programs(pairs, splits, SMS, is_listed)
    assert 1 <= programs <= pairs * splits
    assert programs == pairs * splits or pairs <= programs <= resident(pairs, SMS) * SMS or is_listed


def test_no_decodes() -> None:
    assert share_tokens([], 8, SMS) == 1


@given(tiles=st.integers(1, 200), kv_heads=st.integers(1, 64), max_context=st.integers(1, 131_072), programs=st.integers(1, 264))
def test_chunks_are_cut_where_two_shares_of_each_tile_run_at_once(tiles: int, kv_heads: int, max_context: int, programs: int) -> None:
    room = chunk_cut(tiles, kv_heads, max_context, programs).room
    assert room * kv_heads <= programs
    assert (room > 0) == (2 * tiles <= programs // kv_heads and max_context >= 2 * FEWEST_KEYS)


def test_chunks_of_llama_8b() -> None:
    """8 KV heads, 16 tokens a tile, two programs on a multiprocessor: up to 256 tokens."""
    assert [chunk_cut(tokens // 16, 8, 16_384, 2 * SMS).room for tokens in (16, 128, 256, 272, 1024)] == [33, 33, 33, 0, 0]
    assert [chunk_cut(1, 8, context, 2 * SMS).room for context in (16, 1023, 1024)] == [0, 0, 33]
