"""Pools in GPU memory: one plain allocation each, how another process finds it, and its mapping there."""

import secrets
from contextlib import ExitStack, suppress

import msgspec
import torch
from msgspec import Struct

from ...messages.errors import ClusterError, LayoutMismatch, PeerGone
from ...messages.membership import MemoryDescriptor
from ..shm import HEADER_BYTES, host_identity
from . import cudart
from .counters import PeerCounters

VERSION = 1
GRANULE_BYTES = 2 << 20
"""The driver shares memory in pieces of this size: a pool that fills its pieces exposes nobody else's allocations."""

THIS_PROCESS = secrets.token_bytes(16)
"""Process ids would not do: containers that share /dev/shm may have equal ones."""


class Location(Struct, frozen=True, array_like=True):
    """What a writer must know of a pool; packed into MemoryDescriptor.location."""

    version: int
    process: bytes                # THIS_PROCESS of the owner: nobody can open a handle of its own
    handle: bytes                 # cudaIpcMemHandle_t
    address: int                  # in the owner's process
    device: int                   # in the owner's numbering
    num_bytes: int
    counters: str                 # the segment's name

    def pack(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @staticmethod
    def unpack(packed: bytes) -> "Location":
        """Raises PeerGone."""
        try:
            location = msgspec.msgpack.decode(packed, type=Location)
        except msgspec.MsgspecError as error:
            raise PeerGone(f"{len(packed)} bytes are no location of transport nvlink: {error}") from None
        if location.version != VERSION or len(location.handle) != cudart.HANDLE_BYTES:
            raise PeerGone(f"location of version {location.version} with a handle of {len(location.handle)} bytes, {VERSION} is known here")
        return location


def check_page_bytes(descriptor: MemoryDescriptor, page_bytes: int) -> None:
    """Raises LayoutMismatch."""
    if descriptor.page_bytes != page_bytes:
        raise LayoutMismatch(f"pages of {descriptor.page_bytes} bytes there, {page_bytes} here")


def location_here(descriptor: MemoryDescriptor) -> Location:
    """Raises PeerGone: another host, nothing of ours."""
    if descriptor.host != host_identity():
        raise PeerGone(f"GPU memory of {descriptor.host}, this is {host_identity()}")
    return Location.unpack(descriptor.location)


class DeviceMemory:
    """Zeros on the current device; freed with the last tensor over it. Raises ClusterError with the sizes."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = -(-num_bytes // GRANULE_BYTES) * GRANULE_BYTES
        self._address: int | None = None
        try:
            torch.cuda.empty_cache()               # what torch holds back would be missing here
            self._address = cudart.allocate(self.num_bytes)
        except cudart.CudaError as error:
            free, total = torch.cuda.mem_get_info()
            text = f"{self.num_bytes} bytes of GPU memory wanted for the KV pool, {free} of {total} free: {error}"
            raise ClusterError(text) from None
        self.address = self._address

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {"shape": (self.num_bytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}

    def __del__(self) -> None:
        if self._address is not None:
            with suppress(cudart.CudaError):       # the process may be ending, and CUDA have gone first
                cudart.free(self._address)

    def tensor(self, device: torch.device) -> torch.Tensor:
        """[num_bytes] uint8; keeps the memory."""
        return torch.as_tensor(self, device=device)


class PeerMemory:
    """A peer's pool and counters in this process: their addresses on the device. Raises PeerGone, LayoutMismatch."""

    def __init__(self, location: Location, pool_bytes: int, device: int) -> None:
        if not 0 < pool_bytes <= location.num_bytes:
            raise LayoutMismatch(f"{pool_bytes} bytes of pages announced, the memory has {location.num_bytes}")
        with ExitStack() as undo:                  # whatever fails, nothing stays mapped
            counters = PeerCounters(location.counters)
            undo.callback(counters.close)
            try:
                self.counters = cudart.map_host(counters.address, HEADER_BYTES)
                undo.callback(cudart.unmap_host, counters.address)
                self.pool = _open(location, device, undo)
            except cudart.CudaError as error:
                raise PeerGone(f"cannot map {location.num_bytes} bytes of {location.counters}: {error}") from None
            self._undo = undo.pop_all()

    def close(self) -> None:
        self._undo.close()


def _open(location: Location, device: int, undo: ExitStack) -> int:
    if location.process != THIS_PROCESS:
        address = cudart.ipc_open(location.handle)
        undo.callback(cudart.ipc_close, address)
        return address
    if location.device != device:
        raise PeerGone(f"cuda:{location.device} and cuda:{device} of one process: each GPU needs its own")
    return location.address
