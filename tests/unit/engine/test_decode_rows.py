"""A step of decodes as one array: every column is where the graph reads it, and what was in the buffer before does not show."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from diptych.engine.decode_rows import PADDING, DecodeRow, pack_decodes
from diptych.engine.draw import Draw
from diptych.kernels.decode_inputs import HEADER, REAL

POISON = -7777
ROOM = 12 * len(HEADER) + 12 * 9 + 5

draws = st.builds(
    Draw,
    temperature=st.floats(0, 2),
    top_k=st.integers(0, 200_000),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    fraction=st.floats(0, 1, exclude_max=True),
)
rows = st.builds(
    DecodeRow,
    context=st.integers(1, 131_072),
    source=st.integers(-1, 255),
    token=st.integers(0, 200_000),
    blocks=st.lists(st.integers(0, 2**31 - 1), max_size=9),
    draw=draws,
)


@given(st.lists(rows, min_size=1, max_size=8), st.integers(0, 4), st.integers(1, 131_072))
def test_each_column_is_where_it_is_read(rows: list[DecodeRow], num_padding: int, share: int) -> None:
    size, out = len(rows) + num_padding, np.full(ROOM, POISON, dtype=np.int32)
    end = pack_decodes(rows, size, share, out)
    header = {name: out[column * size : (column + 1) * size] for column, name in enumerate(HEADER)}
    for name in ("context", "source", "token"):
        assert header[name].tolist() == [getattr(row, name) for row in rows] + [0] * num_padding
    assert header["top_k"].tolist() == [row.draw.top_k for row in rows] + [0] * num_padding
    for name in REAL:
        expected = np.array([getattr(row.draw, name) for row in rows] + [0.0] * num_padding, dtype=np.float32)
        assert header[name].view(np.float32).tolist() == expected.tolist()
    assert header["share"].tolist() == [share] * size
    blocks = out[len(HEADER) * size : end]
    for row, offset in zip(rows, header["offset"], strict=False):
        assert blocks[offset : offset + len(row.blocks)].tolist() == row.blocks
    assert len(blocks) == sum(len(row.blocks) for row in rows)
    assert (out[end:] == POISON).all()


def test_padding_alone() -> None:
    out = np.full(ROOM, POISON, dtype=np.int32)
    assert pack_decodes([PADDING], 1, 1, out) == len(HEADER)
    assert out[HEADER.index("context")] == 0
