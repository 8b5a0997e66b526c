"""A pool that no other process reaches: for one engine by itself, as a benchmark or a test runs it."""

from collections.abc import Sequence

import torch

from ..messages.errors import ClusterError, PeerGone
from ..messages.ids import Imm
from ..messages.membership import MemoryDescriptor
from .bundle import TransportBundle
from .layout import KVLayout
from .sharded import ShardedBundle
from .transport import Bundle, KVPool, PageIds, Peer, TransferStats


def local_bundle(devices: Sequence[torch.device]) -> Bundle:
    """Of each rank."""
    ranks = [TransportBundle([LocalTransport(device)]) for device in devices]
    return ranks[0] if len(ranks) == 1 else ShardedBundle(ranks)


class LocalTransport:
    name = "local"
    gathers = False
    overlaps = False
    stats = TransferStats()

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocate(self, layout: KVLayout, num_blocks: int) -> KVPool:
        try:
            return KVPool(layout, torch.zeros(layout.shape(num_blocks), dtype=layout.dtype, device=self._device))
        except torch.OutOfMemoryError as error:
            raise ClusterError(f"no room for {num_blocks} blocks of {layout.rank_block_bytes} bytes on {self._device}: {error}") from None

    def adopt(self, pool: KVPool) -> None:
        return None

    def fence(self, writer: MemoryDescriptor, timeout_s: float) -> bool:
        return True

    def register(self, pool: KVPool) -> MemoryDescriptor:
        return MemoryDescriptor(self.name, "", b"", pool.tensor.nbytes // pool.layout.piece_bytes, pool.layout.piece_bytes, num_imms=0)

    def connect(self, descriptor: MemoryDescriptor) -> Peer:
        raise PeerGone("a local pool reaches no other")

    def disconnect(self, peer: Peer) -> None:
        return None

    def write_pages(self, peer: Peer, src_pages: PageIds, dst_pages: PageIds, imm: Imm) -> None:
        raise PeerGone("a local pool reaches no other")

    def stop(self, peer: Peer, imm: Imm, timeout_s: float) -> bool:
        return True

    def settled(self, peer: Peer, imm: Imm) -> bool:
        return True

    def busy_s(self, peer: Peer, imm: Imm) -> float:
        return 0.0

    def num_landed(self, imm: Imm) -> int:
        return 0

    def reset(self, imm: Imm) -> None:
        return None

    def close(self) -> None:
        return None
