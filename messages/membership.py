"""Who lives, as the controller tells every member on each change."""

from enum import StrEnum

from msgspec import Struct, structs

from .ids import Address, Epoch, WorkerId
from .requests import WorkerRef


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class MemoryDescriptor(Struct, frozen=True):
    """How a peer reaches the KV pool of one of a worker's ranks over one transport. It counts in what is written at once: pages, or pieces
    of pages."""

    transport: str                            # "shm", "nvlink", "ucx", "fake"
    host: str                                 # machine identity: shared memory needs an equal one
    location: bytes                           # the transport's own: a segment's name, a handle, a remote key
    num_pages: int
    page_bytes: int
    num_imms: int                             # that are lent to writers: 0 to num_imms - 1
    rank: int = 0


class PoolLayout(Struct, frozen=True):
    """What the pages of a worker's KV memory are. Their pieces can be copied as they are into a pool whose layout is equal, and into no
    other; among how many ranks the heads of either are shared does not matter."""

    protocol: int
    model: str                                # a fingerprint of the folder
    kv_dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int                           # tokens
    piece_heads: int                          # whose K or V is written at once; 0: whole pages are

    def differences(self, there: "PoolLayout") -> str:
        """By name, with both values: `block_size 64, there 16`; empty if they are equal."""
        mine, theirs = structs.asdict(self), structs.asdict(there)
        return "; ".join(f"{name} {value}, there {theirs[name]}" for name, value in mine.items() if value != theirs[name])


class Member(Struct, frozen=True):
    """A worker as the controller sees it."""

    ref: WorkerRef
    role: Role
    layout_hash: str
    block_size: int                           # tokens
    num_blocks: int
    max_model_len: int                        # tokens, prompt and output together
    descriptors: tuple[MemoryDescriptor, ...] = ()
    draining: bool = False                    # finishes what it has, takes nothing new
    tp: int = 1                               # its ranks, each on a GPU of its own


class Membership(Struct, frozen=True, tag=True):
    """A full snapshot. A worker's life that was listed once and is absent here is confirmed dead: its process no longer exists, or Ray has
    given up its host (then it may go on for a while, cut off, and whoever it could write to has to fence it)."""

    version: int
    workers: tuple[Member, ...]
    gateways: tuple[Address, ...]
    next_epoch: Epoch = Epoch(0)              # of lives that begin after this snapshot; it says nothing of them
    unlisted: tuple[Epoch, ...] = ()          # of earlier lives that may yet be listed: they are starting

    def lives(self, worker_id: WorkerId, epoch: Epoch) -> bool:
        return any(m.ref.worker_id == worker_id and m.ref.epoch == epoch for m in self.workers)

    def has_ended(self, life: WorkerRef) -> bool:
        """The worker's life is confirmed dead, whether it was ever listed or not."""
        return life.epoch < self.next_epoch and life.epoch not in self.unlisted and not self.lives(life.worker_id, life.epoch)
