"""Memory shared by several ranks, seen as one: what a test of the ranks' pools compares with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.kvtransfer.layout import KVLayout
from diptych.kvtransfer.sharded import KVShards, ShardedBundle
from diptych.kvtransfer.transport import KVMemory, Peer
from diptych.messages.ids import Imm

TP_PAIRS = [(1, 1), (1, 2), (2, 1), (2, 2), (2, 4), (4, 2), (1, 4), (4, 1)]
"""Writer's ranks, receiver's ranks."""

HEADS = 4


def layout_of(tp_size: int, dtype: torch.dtype = torch.int64) -> KVLayout:
    return KVLayout("m", dtype, num_layers=3, num_kv_heads=HEADS, head_dim=8, block_size=4, tp_size=tp_size, piece_heads=1)


def whole(memory: KVMemory) -> Tensor:
    """[num_pages, 2, kv_heads, block_size, head_dim], as one rank would hold it; a copy."""
    return torch.cat([pool.tensor.cpu() for pool in memory.ranks], dim=3).flatten(0, 1)


def fill(memory: KVMemory, first: int = 1) -> Tensor:
    """Every number another one, from `first` on; the whole."""
    layout = memory.layout
    shape = (memory.num_blocks, layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
    numbers = torch.arange(first, first + torch.Size(shape).numel()).view(shape).to(layout.dtype)
    for rank, pool in enumerate(memory.ranks):
        pool.tensor.copy_(numbers[:, :, :, rank * layout.rank_heads : (rank + 1) * layout.rank_heads])
    return numbers.flatten(0, 1)


@dataclass
class Side:
    bundle: ShardedBundle
    memory: KVShards

    @classmethod
    def of(cls, bundle: ShardedBundle, num_blocks: int, dtype: torch.dtype = torch.int64) -> "Side":
        memory = bundle.allocate(layout_of(len(bundle._ranks), dtype), num_blocks)
        bundle.register(memory)
        return cls(bundle, memory)

    def wanted(self, num_pages: int) -> int:
        """What so many pages count as."""
        return num_pages * self.memory.layout.pieces_per_page


def write(writer: Side, peer: Peer, pages: dict[int, int], imm: int) -> None:
    """Page here: page there."""
    writer.bundle.write_pages(peer, list(pages), list(pages.values()), Imm(imm))
