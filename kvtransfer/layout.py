"""The shape of a KV pool, and what two pools must share to exchange pages.

    rank's pool[num_blocks, num_layers, 2 (K, V), num_kv_heads / tp_size, block_size, head_dim]      block-major, contiguous
    page  = one layer of one block, of all ranks;  page id = block id × num_layers + layer
    piece = what is written at once, contiguous on both sides: K or V of `piece_heads` heads of a page; the whole page where
            piece_heads is 0

Heads come before tokens, so the pieces of a page stand in the order of its heads, first of K, then of V.
"""

import hashlib
from dataclasses import dataclass

import msgspec
import torch

from ..messages.membership import PoolLayout

PROTOCOL_VERSION = 2


@dataclass(frozen=True)
class KVLayout:
    """Raises ValueError if the heads cannot be shared so."""

    model: str                     # what the KV means: pages of two models never mix
    dtype: torch.dtype
    num_layers: int
    num_kv_heads: int              # of all ranks
    head_dim: int
    block_size: int                # tokens
    tp_size: int = 1               # ranks; each has an equal run of heads of every block
    piece_heads: int = 0           # 0: of one rank alone; its peers, too, write whole pages

    def __post_init__(self) -> None:
        if self.tp_size < 1 or self.num_kv_heads % self.tp_size:
            raise ValueError(f"{self.num_kv_heads} KV heads cannot be shared by {self.tp_size} ranks")
        if self.piece_heads == 0 and self.tp_size > 1:
            raise ValueError(f"pages of {self.tp_size} ranks are moved in pieces, and piece_heads is 0")
        if self.piece_heads < 0 or (self.piece_heads and self.rank_heads % self.piece_heads):
            raise ValueError(f"{self.rank_heads} KV heads of a rank cannot be moved in pieces of {self.piece_heads}")

    @property
    def rank_heads(self) -> int:
        """Of each rank."""
        return self.num_kv_heads // self.tp_size

    @property
    def page_bytes(self) -> int:
        """Of all ranks."""
        return 2 * self._head_bytes * self.num_kv_heads

    @property
    def block_bytes(self) -> int:
        """Of all ranks."""
        return self.num_layers * self.page_bytes

    @property
    def rank_block_bytes(self) -> int:
        return self.block_bytes // self.tp_size

    @property
    def piece_bytes(self) -> int:
        return self._head_bytes * self.piece_heads or self.page_bytes

    @property
    def pieces_per_page(self) -> int:
        """Of all ranks."""
        return self.page_bytes // self.piece_bytes

    @property
    def rank_pieces_per_page(self) -> int:
        return self.pieces_per_page // self.tp_size

    @property
    def _head_bytes(self) -> int:
        """K or V of one head of a page."""
        return self.block_size * self.head_dim * self.dtype.itemsize

    def shape(self, num_blocks: int) -> tuple[int, ...]:
        """Of one rank's pool."""
        return (num_blocks, self.num_layers, 2, self.rank_heads, self.block_size, self.head_dim)

    def page_id(self, block_id: int, layer: int) -> int:
        return block_id * self.num_layers + layer

    @property
    def told(self) -> PoolLayout:
        """As workers tell each other. How many ranks share the heads is not in it: it is no matter to pieces."""
        shape = (self.num_layers, self.num_kv_heads, self.head_dim, self.block_size, self.piece_heads)
        return PoolLayout(PROTOCOL_VERSION, self.model, str(self.dtype).removeprefix("torch."), *shape)

    @property
    def hash(self) -> str:
        """Equal exactly if pieces can be copied as they are."""
        return hashlib.blake2b(msgspec.msgpack.encode(self.told), digest_size=16).hexdigest()
