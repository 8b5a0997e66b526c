"""Which batch sizes get a CUDA graph."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from diptych.engine.decode_graphs import batch_sizes


@given(st.integers(1, 1024))
def test_every_batch_fits_one_and_little_of_it_is_padding(max_sequences: int) -> None:
    sizes = batch_sizes(max_sequences)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_sequences
    for batch in range(1, max_sequences + 1):
        padding = min(size for size in sizes if size >= batch) - batch
        assert padding <= max(7, batch // 4), f"{padding} rows of padding for {batch}"
