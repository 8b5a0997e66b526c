"""The shape of a KV pool, and what two pools must share to exchange pages.

    pool[num_blocks, num_layers, 2 (K, V), num_kv_heads, block_size, head_dim]      block-major, contiguous
    page = one layer of one block: K and V of all heads, contiguous;  page id = block id × num_layers + layer
"""

import hashlib
from dataclasses import dataclass

import msgspec
import torch

from ..messages.membership import PoolLayout

PROTOCOL_VERSION = 1


@dataclass(frozen=True)
class KVLayout:
    model: str                     # what the KV means: pages of two models never mix
    dtype: torch.dtype
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int                # tokens
    tp_size: int = 1

    @property
    def page_bytes(self) -> int:
        return 2 * self.num_kv_heads * self.block_size * self.head_dim * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.page_bytes

    def shape(self, num_blocks: int) -> tuple[int, ...]:
        return (num_blocks, self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    def page_id(self, block_id: int, layer: int) -> int:
        return block_id * self.num_layers + layer

    @property
    def told(self) -> PoolLayout:
        """As workers tell each other."""
        shape = (self.num_layers, self.num_kv_heads, self.head_dim, self.block_size, self.tp_size)
        return PoolLayout(PROTOCOL_VERSION, self.model, str(self.dtype).removeprefix("torch."), *shape)

    @property
    def hash(self) -> str:
        """Equal exactly if pages can be copied as they are."""
        return hashlib.blake2b(msgspec.msgpack.encode(self.told), digest_size=16).hexdigest()
