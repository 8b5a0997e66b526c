"""The counters of one pool: a small segment of POSIX shared memory, which the owner reads without CUDA and writers map for their GPU.

    /dev/shm/diptych-CLUSTER-WORKER-EPOCH.counts  =  NUM_IMMS counters (uint64)

As with the transport `shm`, the owner holds a lock on its segment as long as it lives; one whose lock is free belongs to a dead process,
and the next worker to start removes it.
"""

import fcntl
import mmap
import os
from pathlib import Path

import numpy as np

from ...messages.errors import ClusterError, PeerGone
from ...messages.ids import Epoch, Imm, WorkerId
from ..shm import HEADER_BYTES, PREFIX, SEGMENT_NAME, SHM
from ..transport import NUM_IMMS


class OwnCounters:
    """Raises ClusterError if there is no shared memory left."""

    def __init__(self, cluster: str, worker_id: WorkerId, epoch: Epoch) -> None:
        self._path = SHM / f"{PREFIX}{cluster}-{worker_id}-{epoch}.counts"
        self._fd: int | None = None
        try:
            self._fd = _create_locked(self._path)
            os.posix_fallocate(self._fd, 0, HEADER_BYTES)
        except OSError as error:
            self.close()
            raise ClusterError(f"{self._path}: {HEADER_BYTES} bytes of shared memory wanted: {error.strerror}") from None
        self._values = np.frombuffer(mmap.mmap(self._fd, HEADER_BYTES), np.uint64, NUM_IMMS)

    @property
    def name(self) -> str:
        return self._path.name

    def read(self, imm: Imm) -> int:
        return int(self._values[imm])

    def reset(self, imm: Imm) -> None:
        self._values[imm] = 0

    def close(self) -> None:
        if self._fd is not None:                  # the name is ours for as long as we hold the lock
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = None


def _create_locked(path: Path) -> int:
    """A sweep that comes before the lock takes the new segment for an orphan: then another one is made."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)


class PeerCounters:
    """Another process's counters in this one's memory, page-aligned. Raises PeerGone, also if the owner no longer lives."""

    def __init__(self, name: str) -> None:
        if not SEGMENT_NAME.fullmatch(name.encode()):
            raise PeerGone(f"{name!r} is no segment of ours")
        try:
            fd = os.open(SHM / name, os.O_RDWR | os.O_NOFOLLOW)
        except OSError as error:
            raise PeerGone(f"{SHM / name}: {error.strerror}") from None
        try:
            if os.fstat(fd).st_size != HEADER_BYTES or not _is_locked(fd):
                raise PeerGone(f"{SHM / name} has {os.fstat(fd).st_size} bytes of {HEADER_BYTES}, or its owner no longer lives")
            self._memory = mmap.mmap(fd, HEADER_BYTES)
        finally:
            os.close(fd)
        self.address = np.frombuffer(self._memory, np.uint8).ctypes.data

    def close(self) -> None:
        self._memory.close()


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False
