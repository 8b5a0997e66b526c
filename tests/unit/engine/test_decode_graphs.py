"""Which batch sizes get a CUDA graph, and what is uploaded for one."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from diptych.engine.decode_graphs import DecodeGraphs, batch_sizes
from diptych.engine.decode_rows import PADDING, DecodeRow, pack_decodes
from diptych.engine.draw import DRAWN_AGAIN
from diptych.kernels.context_shares import share_tokens


@given(st.integers(1, 1024))
def test_every_batch_fits_one_and_little_of_it_is_padding(max_sequences: int) -> None:
    sizes = batch_sizes(max_sequences)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_sequences
    for batch in range(1, max_sequences + 1):
        padding = min(size for size in sizes if size >= batch) - batch
        assert padding <= max(7, batch // 4), f"{padding} rows of padding for {batch}"


def test_what_is_uploaded_and_that_a_rouse_uploads_padding() -> None:
    graphs = object.__new__(DecodeGraphs)
    graphs._upload, graphs._sizes, graphs._num_sms = torch.zeros(100, dtype=torch.int32), [1, 2, 4], 132
    graphs._pool = SimpleNamespace(layout=SimpleNamespace(rank_heads=8))            # type: ignore[assignment]
    graphs._staging = SimpleNamespace(next=lambda: torch.zeros(400, dtype=torch.uint8))            # type: ignore[assignment]
    rows = [DecodeRow(context, 0, 5, [7, 8], DRAWN_AGAIN) for context in (20, 30, 31)]
    expected = np.zeros(100, dtype=np.int32)
    end = pack_decodes(rows, 4, share_tokens([20, 30, 31], 8, 132), expected)
    graphs._stage(rows, 4)
    assert graphs._upload[:end].tolist() == expected[:end].tolist()
    graphs.rouse()
    end = pack_decodes([PADDING], 1, 1, expected)
    assert graphs._upload[:end].tolist() == expected[:end].tolist()
