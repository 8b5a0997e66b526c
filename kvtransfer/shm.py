"""Transport for CPU workers of one host: pools live in POSIX shared memory, and the writer copies into the peer's.

    /dev/shm/diptych-CLUSTER-WORKER-EPOCH  =  NUM_IMMS counters (uint64)  |  pool

One thread per process copies, in order, while the engine's thread computes. A count is raised after its pages have been copied; a
counter has one writer at a time, so a plain store will do. The owner holds a lock on its segment as long as it lives: a segment
whose lock is free belongs to a dead process, and the next worker to start removes it.
"""

import fcntl
import mmap
import os
import platform
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..messages.errors import ClusterError, LayoutMismatch, PeerGone, TransferError
from ..messages.ids import Epoch, Imm, WorkerId
from ..messages.membership import MemoryDescriptor
from .layout import KVLayout
from .transport import NUM_IMMS, KVPool, PageIds, Peer, TransferStats

SHM = Path("/dev/shm")
HEADER_BYTES = NUM_IMMS * 8
PREFIX = "diptych-"
STRONGLY_ORDERED = ("x86_64", "AMD64")        # elsewhere a count could be seen before its pages
SEGMENT_NAME = re.compile(rb"diptych-[A-Za-z0-9._-]+")


def host_identity() -> str:
    """Equal for processes that share /dev/shm."""
    status = SHM.stat()
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    boot = boot_id.read_text().strip() if boot_id.exists() else socket.gethostname()
    return f"{boot}:{status.st_dev}:{status.st_ino}"


def sweep_orphans(cluster: str) -> list[str]:
    """Removes the cluster's segments whose owners are dead; returns their names. Somebody else's are left alone."""
    removed = []
    for path in SHM.glob(f"{PREFIX}{cluster}-*"):
        try:
            with path.open("rb") as segment:
                fcntl.flock(segment, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(segment.fileno()).st_nlink:        # or another sweep was faster, and the name may be a new life's
                    path.unlink()
                    removed.append(path.name)
        except OSError:
            continue
    return removed


@dataclass
class _Mapping:
    """A segment in this process's memory."""

    memory: mmap.mmap
    page_bytes: int

    def __post_init__(self) -> None:
        self.counters = np.frombuffer(self.memory, np.uint64, NUM_IMMS)
        self.pages = np.frombuffer(self.memory, np.uint8, offset=HEADER_BYTES).reshape(-1, self.page_bytes)

    def close(self) -> None:
        del self.counters, self.pages
        self.memory.close()


@dataclass(frozen=True)
class _Job:
    location: bytes
    src_pages: Sequence[int]
    dst_pages: Sequence[int]
    imm: Imm

    @property
    def key(self) -> tuple[bytes, Imm]:
        return self.location, self.imm


@dataclass
class _Queue:
    """Jobs for the copying thread; every field is guarded by `changed`."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    jobs: deque[_Job] = field(default_factory=deque)
    running: _Job | None = None
    is_stopped: bool = False                  # the running one: what is left of it is dropped, and nothing of it counts
    busy_s: dict[tuple[bytes, Imm], float] = field(default_factory=dict)
    closed: bool = False
    failure: BaseException | None = None      # what ended the thread: nothing is known of the write it was at

    def settled(self, condition: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """`condition` holds within the time. Raises RuntimeError if the thread has failed: the process must not go on."""
        reached = self.changed.wait_for(lambda: self.failure is not None or condition(), timeout_s)
        if self.failure is not None:
            raise RuntimeError("the thread that copies pages has ended") from self.failure
        return reached


class ShmTransport:
    name = "shm"
    gathers = False
    overlaps = False

    def __init__(self, cluster: str, worker_id: WorkerId, epoch: Epoch) -> None:
        self._cluster = cluster
        self._path = SHM / f"{PREFIX}{cluster}-{worker_id}-{epoch}"
        self._fd: int | None = None
        self._own: _Mapping | None = None
        self._peers: dict[bytes, _Mapping] = {}
        self._queue = _Queue()
        self._stats = TransferStats()
        self._thread = threading.Thread(target=self._copy_all, name="shm-writer", daemon=True)
        self._thread.start()

    # the receiver's side

    def allocate(self, layout: KVLayout, num_blocks: int) -> KVPool:
        if platform.machine() not in STRONGLY_ORDERED:
            raise ClusterError(f"transport shm relies on the store order of x86-64; this machine is {platform.machine()}")
        sweep_orphans(self._cluster)
        pool_bytes = num_blocks * layout.rank_block_bytes
        memory = self._create(HEADER_BYTES + pool_bytes)
        self._own = _Mapping(memory, layout.piece_bytes)
        tensor = torch.frombuffer(memory, dtype=torch.uint8, offset=HEADER_BYTES).view(layout.dtype).view(layout.shape(num_blocks))
        return KVPool(layout, tensor)

    def adopt(self, pool: KVPool) -> None:
        raise ClusterError(f"{pool.tensor.nbytes} bytes of another transport's memory: the pool of shm is a segment of its own")

    def _create(self, size: int) -> mmap.mmap:
        try:
            self._fd = self._open_locked()
            os.posix_fallocate(self._fd, 0, size)     # now, or a page fault later would be a SIGBUS
        except OSError as error:
            free = os.statvfs(SHM).f_bavail * os.statvfs(SHM).f_frsize
            self.close()
            raise ClusterError(f"{self._path}: {size} bytes of shared memory wanted, {free} free: {error.strerror}") from None
        return mmap.mmap(self._fd, size)

    def _open_locked(self) -> int:
        """A sweep that comes before the lock takes the new segment for an orphan: then another one is made."""
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                return fd
            os.close(fd)

    def register(self, pool: KVPool) -> MemoryDescriptor:
        return MemoryDescriptor(
            transport=self.name,
            host=host_identity(),
            location=self._path.name.encode(),
            num_pages=pool.tensor.nbytes // pool.layout.piece_bytes,
            page_bytes=pool.layout.piece_bytes,
            num_imms=NUM_IMMS,
        )

    def num_landed(self, imm: Imm) -> int:
        assert self._own is not None
        return int(self._own.counters[imm])

    def reset(self, imm: Imm) -> None:
        assert self._own is not None
        self._own.counters[imm] = 0

    def fence(self, writer: MemoryDescriptor, timeout_s: float) -> bool:
        """Its stores ended with it."""
        return True

    # the writer's side

    def connect(self, descriptor: MemoryDescriptor) -> Peer:
        assert self._own is not None
        if descriptor.page_bytes != self._own.page_bytes:
            raise LayoutMismatch(f"pages of {descriptor.page_bytes} bytes there, {self._own.page_bytes} here")
        if descriptor.location not in self._peers:
            self._peers[descriptor.location] = self._map(descriptor)
        return Peer(descriptor)

    def _map(self, descriptor: MemoryDescriptor) -> _Mapping:
        if descriptor.host != host_identity():
            raise PeerGone(f"{descriptor.location!r} is in the shared memory of {descriptor.host}, this is {host_identity()}")
        if not SEGMENT_NAME.fullmatch(descriptor.location):
            raise PeerGone(f"{descriptor.location!r} is no segment of ours")
        path = SHM / descriptor.location.decode()
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError as error:
            raise PeerGone(f"{path}: {error.strerror}") from None
        try:
            size, pool_bytes = os.fstat(fd).st_size, descriptor.num_pages * descriptor.page_bytes
            if size != HEADER_BYTES + pool_bytes or not pool_bytes:
                raise LayoutMismatch(f"{path} has {size} bytes, {descriptor.num_pages} pages of {descriptor.page_bytes} were announced")
            return _Mapping(mmap.mmap(fd, size), descriptor.page_bytes)
        finally:
            os.close(fd)

    def disconnect(self, peer: Peer) -> None:
        location = peer.descriptor.location
        with self._queue.changed:
            self._queue.jobs = deque(job for job in self._queue.jobs if job.location != location)
            self._queue.settled(lambda: self._queue.running is None or self._queue.running.location != location)
            mapping = self._peers.pop(location, None)
            self._queue.busy_s = {key: busy_s for key, busy_s in self._queue.busy_s.items() if key[0] != location}
        if mapping is not None:
            mapping.close()

    def write_pages(self, peer: Peer, src_pages: PageIds, dst_pages: PageIds, imm: Imm) -> None:
        assert self._own is not None
        location = peer.descriptor.location
        if location not in self._peers:
            raise PeerGone(f"{location.decode()} is not connected")
        src, dst = _indices(src_pages), _indices(dst_pages)
        _check_pages(src, len(self._own.pages), "here")
        _check_pages(dst, len(self._peers[location].pages), "there")
        if len(src) != len(dst) or not 0 <= imm < NUM_IMMS:
            raise TransferError(f"{len(src)} pages to {len(dst)} places, counter {imm} of {NUM_IMMS}")
        with self._queue.changed:
            self._queue.settled(lambda: True)
            self._queue.jobs.append(_Job(location, src, dst, imm))
            self._queue.changed.notify_all()

    def stop(self, peer: Peer, imm: Imm, timeout_s: float) -> bool:
        key = (peer.descriptor.location, imm)
        with self._queue.changed:
            self._queue.jobs = deque(job for job in self._queue.jobs if job.key != key)
            self._queue.is_stopped |= self._queue.running is not None and self._queue.running.key == key
            stopped = self._queue.settled(lambda: self._queue.running is None or self._queue.running.key != key, timeout_s)
            if stopped:
                self._queue.busy_s.pop(key, None)
            return stopped

    def settled(self, peer: Peer, imm: Imm) -> bool:
        key = (peer.descriptor.location, imm)
        with self._queue.changed:
            self._queue.settled(lambda: True)
            return all(job is None or job.key != key for job in (self._queue.running, *self._queue.jobs))

    def busy_s(self, peer: Peer, imm: Imm) -> float:
        with self._queue.changed:
            return self._queue.busy_s.get((peer.descriptor.location, imm), 0.0)

    @property
    def stats(self) -> TransferStats:
        return self._stats

    def close(self) -> None:
        with self._queue.changed:
            self._queue.closed = True
            self._queue.changed.notify_all()
        self._thread.join()
        if self._fd is not None:                  # the name is ours for as long as we hold the lock
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = None

    # the copying thread

    def _copy_all(self) -> None:
        try:
            for job in self._jobs():
                started = time.perf_counter()
                num_copied = self._copy(job)
                self._account(job, num_copied, time.perf_counter() - started)
        except BaseException as error:        # raised again in the engine's thread
            with self._queue.changed:
                self._queue.failure = error
                self._queue.changed.notify_all()

    def _jobs(self) -> Iterator[_Job]:
        queue = self._queue
        while True:
            with queue.changed:
                queue.running = None
                queue.changed.notify_all()
                queue.changed.wait_for(lambda: bool(queue.jobs) or queue.closed)
                if queue.closed:
                    return
                queue.running, queue.is_stopped = queue.jobs.popleft(), False
            yield queue.running

    def _copy(self, job: _Job) -> int:
        """→ how many pages were copied."""
        assert self._own is not None
        source, target, queue = self._own.pages, self._peers[job.location], self._queue
        for num_copied, (src, dst) in enumerate(zip(job.src_pages, job.dst_pages, strict=True)):
            if queue.is_stopped:
                return num_copied
            target.pages[dst] = source[src]
        with queue.changed:
            if not queue.is_stopped:
                target.counters[job.imm] += np.uint64(len(job.dst_pages))
        return len(job.dst_pages)

    def _account(self, job: _Job, num_pages: int, seconds: float) -> None:
        with self._queue.changed:
            self._queue.busy_s[job.key] = self._queue.busy_s.get(job.key, 0.0) + seconds
            self._stats = self._stats.plus(num_pages, num_pages * self._peers[job.location].page_bytes, seconds)


def _indices(pages: PageIds) -> Sequence[int]:
    """Python's own integers index faster than numpy's."""
    return pages.tolist() if isinstance(pages, np.ndarray) else pages


def _check_pages(pages: Sequence[int], num_pages: int, where: str) -> None:
    if pages and not 0 <= min(pages) <= max(pages) < num_pages:
        raise TransferError(f"pages {min(pages)} to {max(pages)}: there are {num_pages} {where}")
