"""Ends of the transport `shm` in one process: a worker's pool and descriptor, and what has landed there."""

from collections.abc import Callable
from pathlib import Path
from time import monotonic

import torch
from harness.shm_process import LAYOUT, NUM_BLOCKS, NUM_PAGES

from diptych.kvtransfer.shm import SHM, ShmTransport
from diptych.kvtransfer.transport import KVPool
from diptych.messages.ids import Epoch, Imm, WorkerId

TIMEOUT_S = 20.0
IMM = Imm(3)


class Side:
    """One worker's transport, pool and descriptor."""

    def __init__(self, cluster: str, worker: str, epoch: int = 1) -> None:
        self.transport = ShmTransport(cluster, WorkerId(worker), Epoch(epoch))
        self.pool: KVPool = self.transport.allocate(LAYOUT, NUM_BLOCKS)
        self.descriptor = self.transport.register(self.pool)

    @property
    def path(self) -> Path:
        return SHM / self.descriptor.location.decode()

    @property
    def pages(self) -> torch.Tensor:
        """One number a page; -1 for a page whose bytes differ."""
        pages = self.pool.tensor.view(NUM_PAGES, -1).to(torch.int64)
        return torch.where((pages == pages[:, :1]).all(1), pages[:, 0], -1)


def wait_for(condition: Callable[[], bool]) -> None:
    give_up_at = monotonic() + TIMEOUT_S
    while not condition():
        assert monotonic() < give_up_at, f"not within {TIMEOUT_S} s"


def landed(side: Side, imm: Imm, count: int) -> None:
    wait_for(lambda: side.transport.num_landed(imm) >= count)
    assert side.transport.num_landed(imm) == count
