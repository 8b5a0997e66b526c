"""The fake model on memory that several ranks share: each head of K and of V holds a token's mix in a form of its own, so that a piece
that came to another head's place shows as a wrong token."""

from collections.abc import Sequence
from dataclasses import replace

from diptych.engine.fake_runner import PRIME, FakeRunner, fake_layout, kv_of
from diptych.engine.scheduler import Chunk
from diptych.kvtransfer.layout import KVLayout
from diptych.kvtransfer.transport import KVMemory

HEADS = 4
NO_TOKEN = -1


def sharded_layout(tp_size: int, block_size: int, num_layers: int) -> KVLayout:
    return replace(fake_layout(block_size, num_layers), num_kv_heads=HEADS, tp_size=tp_size, piece_heads=1)


class ShardedRunner(FakeRunner):
    def __init__(self, memory: KVMemory, vocab: int = 997) -> None:
        self._pool = memory
        self._vocab = vocab

    def _write(self, chunk: Chunk, layer: int) -> None:
        for position in range(chunk.start, chunk.end):
            block, offset = self._cell(chunk, position)
            mix = kv_of(chunk.sequence.token_ids[position], position, layer)
            for rank, pool in enumerate(self._pool.ranks):
                for kv in range(2):
                    for head in range(pool.layout.rank_heads):
                        of_all = rank * pool.layout.rank_heads + head
                        pool.tensor[block, layer, kv, head, offset, 0] = mix + PRIME * _form(kv, of_all)

    def token_after(self, cells: Sequence[tuple[int, int]]) -> int:
        total = 0
        for position, (block, offset) in enumerate(cells):
            for layer in range(self._pool.layout.num_layers):
                mixes = {mix for kv in range(2) for mix in self._mixes(block, layer, kv, offset)}
                if len(mixes) != 1:
                    return NO_TOKEN
                total += mixes.pop() * (position + 1)
        return total % PRIME % self._vocab

    def _mixes(self, block: int, layer: int, kv: int, offset: int) -> list[int]:
        """What each head says of one token."""
        numbers = [number for pool in self._pool.ranks for number in pool.tensor[block, layer, kv, :, offset, 0].tolist()]
        return [number - PRIME * _form(kv, head) for head, number in enumerate(numbers)]


def _form(kv: int, head: int) -> int:
    return 1 + kv * HEADS + head
