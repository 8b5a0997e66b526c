"""Which transports there are, by name, what each can do, and which of some that were measured is to be used. A new one is one line in
KINDS.

The spec is checked against this table where torch is not loaded, so a transport is imported only when it is made.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..messages.errors import ClusterError
from ..messages.ids import Epoch, WorkerId
from ..messages.requests import LinkFigures

if TYPE_CHECKING:
    from .bundle import TransportBundle
    from .sharded import ShardedBundle
    from .transport import Transport


AS_FAST = 0.9
"""Of the best GB/s: what differs less is taken for noise."""


@dataclass(frozen=True)
class Owner:
    """Whose transport it will be."""

    cluster: str
    worker_id: WorkerId
    epoch: Epoch
    device: str                               # where its pool is: "cpu", "cuda" or "cuda:N"

    def of_rank(self, rank: int, device: str) -> "Owner":
        """One name for each rank's shared memory; the first rank's is the worker's own."""
        return replace(self, worker_id=WorkerId(f"{self.worker_id}.{rank}") if rank else self.worker_id, device=device)


def _shm(owner: Owner) -> "Transport":
    from .shm import ShmTransport

    return ShmTransport(owner.cluster, owner.worker_id, owner.epoch)


def _ucx(owner: Owner) -> "Transport":
    import torch

    from .ucx.transport import UcxTransport

    return UcxTransport(torch.device(owner.device))


def _nvlink(owner: Owner) -> "Transport":
    import torch

    from .nvlink.transport import NvlinkTransport

    return NvlinkTransport(owner.cluster, owner.worker_id, owner.epoch, torch.device(owner.device))


@dataclass(frozen=True)
class Kind:
    make: Callable[[Owner], "Transport"]
    memory: tuple[str, ...]                   # device types of the pools that it moves
    adopts: bool                              # can take a pool that another transport has allocated


KINDS: dict[str, Kind] = {
    "shm": Kind(_shm, memory=("cpu",), adopts=False),
    "nvlink": Kind(_nvlink, memory=("cuda",), adopts=False),
    "ucx": Kind(_ucx, memory=("cpu", "cuda"), adopts=True),
}


def what_is_wrong(names: Sequence[str], device: str) -> list[str]:
    """With transports in order of preference for pools on `device`; nothing, if they can be made."""
    if not names:
        return ["must name at least one"]
    memory = device.partition(":")[0]
    found = [f"{name!r} is not there yet; known: {', '.join(KINDS)}" for name in names if name not in KINDS]
    found += [f"{name!r} is named twice" for name in KINDS if names.count(name) > 1]
    known = [name for name in KINDS if name in names]
    found += [f"{name!r} does not move memory of {memory}" for name in known if memory not in KINDS[name].memory]
    owners = [name for name in known if not KINDS[name].adopts]
    if len(owners) > 1:
        found.append(f"{' and '.join(owners)} need memory of their own each, and a worker has one pool")
    return found


def fastest_first(measured: Sequence[LinkFigures]) -> list[LinkFigures]:
    """`measured` stands in the spec's order, which decides among those that are about as fast."""
    left, order = list(measured), list[LinkFigures]()
    while left:
        best = max(figures.gbps for figures in left)
        order.append(next(figures for figures in left if figures.gbps >= AS_FAST * best))
        left.remove(order[-1])
    return order


def make_transports(names: Sequence[str], owner: Owner) -> "TransportBundle":
    """Raises ClusterError: unknown, or what it needs is not here (a libucp, a compiler)."""
    from .bundle import TransportBundle

    problems = what_is_wrong(names, owner.device)
    if problems:
        raise ClusterError(f"transports {', '.join(names)}: {'; '.join(problems)}")
    allocates = next((name for name in names if not KINDS[name].adopts), names[0])
    return TransportBundle([KINDS[name].make(owner) for name in names], allocates)


def make_sharded(names: Sequence[str], owner: Owner, devices: Sequence[str]) -> "ShardedBundle":
    """Of a worker whose layout has pieces: rank r's pool is on `devices[r]`. Raises ClusterError, as `make_transports`."""
    from .sharded import ShardedBundle

    return ShardedBundle([make_transports(names, owner.of_rank(rank, device)) for rank, device in enumerate(devices)])
