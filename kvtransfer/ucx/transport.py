"""Transport over UCX: one-sided puts into the peer's pool, between hosts and where nothing better reaches. The shim does the work (shim.h).

    write_pages ─► job ─► puts ══► flush ─► COUNT ─► the receiver's counter ─► ACK
    a GPU's pages leave once the stream that was current at write_pages has computed them
    stop: a job goes no further; True once all jobs of the imm were acknowledged, flushed, or fenced by the link's next life
    fence: what the receiver calls for a writer that is confirmed dead, before it uses the blocks for anything else

The thread that calls all this may be any one thread; UCX has a thread of its own. GPU memory takes the same way, but over lanes that put
into it (GPUDirect RDMA, CUDA IPC) alone: where there is none, there is no link.
"""

import ctypes
import logging
import secrets
import weakref
from contextlib import nullcontext

import msgspec
import numpy as np
import psutil
import torch

from ...messages.errors import ClusterError, LayoutMismatch, PeerGone, TransferError
from ...messages.ids import Imm
from ...messages.membership import MemoryDescriptor
from ..layout import KVLayout
from ..shm import host_identity
from ..transport import NUM_IMMS, KVPool, PageIds, Peer, TransferStats
from .shim import UID_BYTES, Link, Location, MemoryType, Shim

PROTOCOL_VERSION = 2
SLOW_LANES = ("tcp/",)
NO_ANSWER_YET = "no answer yet"          # dx_await_open's word for it
LEAVE_S = 0.1                   # for writes under way to end, when a peer is disconnected
CUDA_DRIVER = "libcuda.so.1"
LEAVE_LIMIT_S = 30.0            # each of the links that end meanwhile may take UCX some seconds

logger = logging.getLogger(__name__)


class UcxTransport:
    name = "ucx"
    gathers = False
    overlaps = True

    def __init__(self, device: torch.device | None = None, stall_s: float = 5.0) -> None:
        """`stall_s` without any progress of writes under way ends a link. Raises ClusterError: no UCX, no compiler."""
        self._device = device or torch.device("cpu")
        self._uid = secrets.token_bytes(UID_BYTES)
        self._shim = Shim(self._uid, NUM_IMMS, stall_s, for_gpu=self._device.type == "cuda")
        self._links: dict[bytes, Link] = {}
        self._open: set[bytes] = set()                               # links that have been open
        self._why_not: dict[bytes, str] = {}                         # of links that are not open, as it was said last
        self._lent: torch.Tensor | None = None                       # memory that UCX has registered until the end, but not allocated
        self._page_bytes = 0
        self._close = weakref.finalize(self, self._shim.close)

    # the receiver's side

    def allocate(self, layout: KVLayout, num_blocks: int) -> KVPool:
        num_bytes = num_blocks * layout.rank_block_bytes
        if self._device.type == "cuda":
            pool = KVPool(layout, self._allocate_on_gpu(num_bytes).view(layout.dtype).view(layout.shape(num_blocks)))
            self.adopt(pool)
            return pool
        tensor = self._allocate_host(num_bytes, layout.piece_bytes)
        self._start(layout)
        return KVPool(layout, tensor.view(layout.dtype).view(layout.shape(num_blocks)))

    def _allocate_on_gpu(self, num_bytes: int) -> torch.Tensor:
        """One plain allocation: pieces of torch's cannot be mapped by a peer of this host."""
        from ..nvlink.memory import DeviceMemory

        with torch.cuda.device(self._device):
            return DeviceMemory(num_bytes).tensor(self._device)[:num_bytes].zero_()

    def adopt(self, pool: KVPool) -> None:
        where = (pool.tensor.data_ptr(), pool.tensor.nbytes, pool.layout.piece_bytes)
        self._lent = pool.tensor
        if not pool.tensor.is_cuda:
            self._shim.register(*where, MemoryType.HOST)
            self._start(pool.layout)
            return
        with torch.cuda.device(pool.tensor.device):
            torch.cuda.synchronize()                              # and the context is this thread's
            self._shim.register(*where, MemoryType.CUDA, CUDA_DRIVER)
            self._start(pool.layout)

    def _start(self, layout: KVLayout) -> None:
        self._page_bytes = layout.piece_bytes
        self._shim.start()

    def _allocate_host(self, num_bytes: int, page_bytes: int) -> torch.Tensor:
        free = psutil.virtual_memory().available
        if num_bytes > free:                                      # UCX would try, and fill the machine's memory
            raise ClusterError(f"{num_bytes} bytes of host memory wanted, {free} free")
        try:
            address = self._shim.allocate(num_bytes, page_bytes)
        except ClusterError as error:
            raise ClusterError(f"{num_bytes} bytes of host memory wanted from UCX, {free} free: {error}") from None
        memory = (ctypes.c_uint8 * num_bytes).from_address(address)
        weakref.finalize(memory, self._shim.release).atexit = False      # whoever holds the tensor holds the memory
        return torch.frombuffer(memory, dtype=torch.uint8).zero_()          # now: first touches are slow

    def register(self, pool: KVPool) -> MemoryDescriptor:
        num_pages = pool.tensor.nbytes // pool.layout.piece_bytes
        location = Location(
            version=PROTOCOL_VERSION,
            uid=self._uid,
            base=pool.tensor.data_ptr(),
            num_pages=num_pages,
            memory_type=MemoryType.CUDA if pool.tensor.is_cuda else MemoryType.HOST,
            lent=self._lent is not None,
            rkey=self._shim.rkey,
            address=self._shim.address,
        )
        logger.info("ucx %s from %s: pool of %d bytes", self._shim.version, self._shim.library, pool.tensor.nbytes)
        return MemoryDescriptor(
            transport=self.name,
            host=host_identity(),
            location=msgspec.msgpack.encode(location),
            num_pages=num_pages,
            page_bytes=pool.layout.piece_bytes,
            num_imms=NUM_IMMS,
        )

    def num_landed(self, imm: Imm) -> int:
        return self._shim.num_landed(imm)

    def reset(self, imm: Imm) -> None:
        self._shim.reset(imm)

    def fence(self, writer: MemoryDescriptor, timeout_s: float) -> bool:
        """True once nothing can land here any more of a writer that is confirmed dead. If its descriptor does not name it, of anybody."""
        try:
            uid = _decode(writer).uid
        except TransferError as error:
            logger.warning("all writers are fenced, and those that live must dial again: %s", error)
            uid = None
        return self._shim.fence(uid, timeout_s)

    # the writer's side

    def connect(self, descriptor: MemoryDescriptor) -> Peer | None:
        if descriptor.page_bytes != self._page_bytes:
            raise LayoutMismatch(f"pages of {descriptor.page_bytes} bytes there, {self._page_bytes} here")
        location = descriptor.location
        if location not in self._links:
            self._links[location] = self._shim.link(_decode(descriptor))
        try:
            lanes = self._shim.await_open(self._links[location], 0.0)
        except PeerGone as reason:
            if self._why_not.get(location, NO_ANSWER_YET) != str(reason):
                logger.warning("no link to %s: %s", _short(descriptor), reason)
            self._why_not[location] = str(reason)
            return None
        self._why_not.pop(location, None)
        if location not in self._open:
            self._open.add(location)
            _report(descriptor, lanes)
        return Peer(descriptor)

    def disconnect(self, peer: Peer) -> None:
        """Raises TransferError if UCX hangs: the process must not go on."""
        link = self._links.pop(peer.descriptor.location, None)
        self._open.discard(peer.descriptor.location)
        self._why_not.pop(peer.descriptor.location, None)
        if link is not None:
            self._shim.unlink(link, LEAVE_S, LEAVE_LIMIT_S)

    def write_pages(self, peer: Peer, src_pages: PageIds, dst_pages: PageIds, imm: Imm) -> None:
        link = self._links.get(peer.descriptor.location)
        if link is None:
            raise PeerGone(f"{_short(peer.descriptor)} is not connected")
        if len(src_pages) != len(dst_pages) or not 0 <= imm < NUM_IMMS:
            raise TransferError(f"{len(src_pages)} pages to {len(dst_pages)} places, imm {imm} of {NUM_IMMS}")
        pages = np.array(src_pages, np.int64), np.array(dst_pages, np.int64)
        if self._device.type == "cpu":
            self._shim.write(link, *pages, imm)
            return
        with torch.cuda.device(self._device):
            self._shim.write(link, *pages, imm, torch.cuda.current_stream().cuda_stream)

    def stop(self, peer: Peer, imm: Imm, timeout_s: float) -> bool:
        link = self._links.get(peer.descriptor.location)
        return link is None or self._shim.stop(link, imm, timeout_s)

    def settled(self, peer: Peer, imm: Imm) -> bool:
        link = self._links.get(peer.descriptor.location)
        return link is None or self._shim.settled(link, imm)

    def busy_s(self, peer: Peer, imm: Imm) -> float:
        link = self._links.get(peer.descriptor.location)
        return 0.0 if link is None else self._shim.busy_s(link, imm)

    @property
    def stats(self) -> TransferStats:
        num_pages, busy_s = self._shim.stats()
        return TransferStats(num_pages, num_pages * self._page_bytes, busy_s)

    def close(self) -> None:
        """The pool's memory goes when its tensor does."""
        self._links.clear()
        with nullcontext() if self._device.type == "cpu" else torch.cuda.device(self._device):        # UCX unmaps in what is current
            self._close()


def _decode(descriptor: MemoryDescriptor) -> Location:
    try:
        location = msgspec.msgpack.decode(descriptor.location, type=Location)
    except msgspec.DecodeError as error:
        raise TransferError(f"a descriptor of {descriptor.transport} that is not ours: {error}") from None
    if location.version != PROTOCOL_VERSION or len(location.uid) != UID_BYTES:
        raise TransferError(f"protocol {location.version} there, {PROTOCOL_VERSION} here; a uid of {len(location.uid)} bytes")
    return location


def _short(descriptor: MemoryDescriptor) -> str:
    return f"ucx peer {_decode(descriptor).uid.hex()[:8]} on {descriptor.host[:8]}"


def _report(descriptor: MemoryDescriptor, lanes: str) -> None:
    """Which lanes UCX chose; a fall-back to TCP is never silent."""
    slow = all(lane.startswith(SLOW_LANES) for lane in lanes.split())
    logger.log(logging.WARNING if slow else logging.INFO, "%s: lanes %s", _short(descriptor), lanes)
