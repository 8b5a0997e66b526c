"""Into how many shares a decode's context is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from diptych.kernels.decode_attention import MAX_SPLITS, MIN_SPLIT_TOKENS, num_splits

SMS = 132


@given(st.integers(1, 512), st.integers(1, 64), st.integers(1, 1 << 20), st.integers(1, 200))
def test_shares_are_neither_too_short_nor_too_many(num_sequences: int, kv_heads: int, max_context: int, num_sms: int) -> None:
    splits = num_splits(num_sequences, kv_heads, max_context, num_sms)
    assert 1 <= splits <= MAX_SPLITS
    assert splits == 1 or max_context // splits >= MIN_SPLIT_TOKENS


def test_one_long_sequence_fills_the_device() -> None:
    assert 8 * num_splits(1, 8, 16384, SMS) >= 2 * SMS


def test_a_large_batch_is_not_cut() -> None:
    assert num_splits(256, 8, 16384, SMS) == 1
