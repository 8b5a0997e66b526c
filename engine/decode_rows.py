"""A step of decodes alone as the one array from which a CUDA graph makes its inputs (kernels/decode_inputs.py). Pure."""

from collections.abc import Sequence
from itertools import accumulate, chain

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ..kernels.decode_inputs import HEADER, REAL, WHOLE
from .draw import DRAWN_AGAIN, Draw


class DecodeRow(Struct, frozen=True):
    """One sequence's part of a step."""

    context: int                # tokens, this step's included
    source: int                 # row of the step before that sampled its token; -1: `token` is it
    token: int
    blocks: Sequence[int]
    draw: Draw


PADDING = DecodeRow(context=0, source=-1, token=0, blocks=(), draw=DRAWN_AGAIN)


def pack_decodes(rows: Sequence[DecodeRow], size: int, share_tokens: int, out: NDArray[np.int32]) -> int:
    """As a step of `size` sequences, those over being padding → how much of `out` is to be uploaded."""
    whole: list[int] = []
    real: list[float] = []
    lengths = [len(row.blocks) for row in rows]
    for row, offset in zip(rows, accumulate(lengths[:-1], initial=0), strict=True):
        draw = row.draw
        whole += (row.context, row.source, row.token, offset, draw.top_k)
        real += (draw.temperature, draw.top_p, draw.min_p, draw.fraction)
    count, header = len(rows), out[: len(HEADER) * size].reshape(len(HEADER), size)
    header[: len(WHOLE), :count] = np.array(whole, dtype=np.int32).reshape(count, len(WHOLE)).T
    header[len(WHOLE) : -1, :count] = np.array(real, dtype=np.float32).view(np.int32).reshape(count, len(REAL)).T
    header[:-1, count:] = 0                                  # of padding: context 0
    header[-1] = share_tokens
    end = header.size + sum(lengths)
    out[header.size : end] = np.fromiter(chain.from_iterable([row.blocks for row in rows]), np.int32, end - header.size)
    return end
