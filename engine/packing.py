"""The chunks of a step as the arrays of a ForwardBatch: pure, in host memory; a runner brings them to its device."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .scheduler import Chunk
from .sequence import PENDING

Ints = NDArray[Any]


@dataclass(frozen=True)
class PackedBatch:
    """Fields, shapes and types of ForwardBatch."""

    token_ids: Ints           # [T] int64; 0 where the token is PENDING
    positions: Ints           # [T] int64
    slots: Ints               # [T] int64
    query_starts: Ints        # [B+1] int32
    context_lens: Ints        # [B] int32
    block_tables: Ints        # [B, widest] int32
    logit_rows: Ints          # [R] int64


def pack(chunks: Sequence[Chunk], spans: Sequence[range], block_size: int) -> PackedBatch:
    """`spans[i]`: the positions of chunk i whose logits are needed."""
    starts = [0, *accumulate(chunk.count for chunk in chunks)]
    positions = [np.arange(chunk.start, chunk.end) for chunk in chunks]
    blocks = [np.array(chunk.sequence.blocks, dtype=np.int64) for chunk in chunks]
    tables = np.zeros((len(chunks), max(map(len, blocks))), dtype=np.int32)
    for table, row in zip(tables, blocks, strict=True):
        table[: len(row)] = row
    rows = [np.arange(s.start - c.start, s.stop - c.start) + first for c, s, first in zip(chunks, spans, starts[:-1], strict=True) if s]
    return PackedBatch(
        token_ids=np.concatenate([_known_ids(chunk) for chunk in chunks]),
        positions=np.concatenate(positions),
        slots=np.concatenate([b[p // block_size] * block_size + p % block_size for b, p in zip(blocks, positions, strict=True)]),
        query_starts=np.array(starts, dtype=np.int32),
        context_lens=np.array([chunk.end for chunk in chunks], dtype=np.int32),
        block_tables=tables,
        logit_rows=np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64),
    )


def _known_ids(chunk: Chunk) -> Ints:
    ids = np.array(chunk.sequence.token_ids[chunk.start : chunk.end], dtype=np.int64)
    ids[ids == PENDING] = 0
    return ids
