"""A model for tests and the simulator whose every token depends on every byte of KV it reads.

The "KV" of a token is a mix of its id, position and layer; the next token is a mix of all KV of the context, read back through the
block table. One wrong, stale or missing page anywhere gives a wrong token, and `next_token` says what the right one is.
"""

from collections.abc import Callable, Sequence

import torch

from ..kvtransfer.layout import KVLayout
from ..kvtransfer.transport import KVPool
from .model_runner import ChunkOutput, SyncRunner
from .sampler import Sampled
from .scheduler import Chunk, StepPlan

PRIME = 1_000_003


def fake_layout(block_size: int = 4, num_layers: int = 2) -> KVLayout:
    return KVLayout("fake", torch.int64, num_layers, num_kv_heads=1, head_dim=1, block_size=block_size)


def kv_of(token_id: int, position: int, layer: int) -> int:
    return (token_id * 7919 + position * 104_729 + layer * 1_299_709 + 1) % PRIME


def next_token(token_ids: Sequence[int], num_layers: int = 2, vocab: int = 997) -> int:
    """What a correct engine samples after `token_ids`."""
    total = sum(kv_of(t, p, layer) * (p + 1) for p, t in enumerate(token_ids) for layer in range(num_layers))
    return total % PRIME % vocab


class FakeRunner(SyncRunner):
    def __init__(self, pool: KVPool, vocab: int = 997) -> None:
        self._pool = pool
        self._vocab = vocab

    def execute(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> list[ChunkOutput]:
        for layer in range(self._pool.layout.num_layers):
            for chunk in plan.chunks:
                self._write(chunk, layer)
            if on_layer is not None:
                on_layer(layer)
        return [ChunkOutput(Sampled(self._read(chunk)) if chunk.samples else None) for chunk in plan.chunks]

    def _cell(self, chunk: Chunk, position: int) -> tuple[int, int]:
        block_size = self._pool.layout.block_size
        return chunk.sequence.blocks[position // block_size], position % block_size

    def _write(self, chunk: Chunk, layer: int) -> None:
        for position in range(chunk.start, chunk.end):
            block, offset = self._cell(chunk, position)
            self._pool.tensor[block, layer, :, 0, offset, 0] = kv_of(chunk.sequence.token_ids[position], position, layer)

    def _read(self, chunk: Chunk) -> int:
        return self.token_after([self._cell(chunk, position) for position in range(chunk.end)])

    def token_after(self, cells: Sequence[tuple[int, int]]) -> int:
        """What follows a context whose KV lies in these (block, offset) cells."""
        total = 0
        for position, (block, offset) in enumerate(cells):
            total += int(self._pool.tensor[block, :, 0, 0, offset, 0].sum()) * (position + 1)
        return total % PRIME % self._vocab
