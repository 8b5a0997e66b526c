"""Which deployments this user has started from this machine, and the Ray heads that were started for them: one small file each.

They lie in $XDG_STATE_HOME/diptych (by default ~/.local/state/diptych), readable by the user alone. A record says where to look; what
runs, the controller says. It is there before what it tells of: whatever ends a command, the next one finds what it has started.

Everything here raises ClusterError where that folder cannot be used.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

from ..messages.errors import ClusterError, SpecError
from .ray_head import Head, stop_head

LOCK_POLL_S = 0.1
SHM = Path("/dev/shm")


class Record(Struct, frozen=True):
    name: str
    address: str                              # of the Ray cluster; empty while its head, ours, is starting
    head: Head | None                         # set if it is ours, and so ours to stop
    endpoint: str | None = None               # once it has served

    def is_of(self, other: "Record") -> bool:
        """Of the same start: its head, or a Ray that is not ours at the same address."""
        if self.head is None or other.head is None:
            return (self.name, self.address, self.head) == (other.name, other.address, other.head)
        return (self.name, self.head.pid, self.head.began_s) == (other.name, other.head.pid, other.head.began_s)


def folder() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "diptych"


@contextmanager
def hold(name: str, wait_s: float = 0.0) -> Iterator[None]:
    """Among commands that start or stop the deployment of that name one at a time. Raises SpecError if another is at it all the while."""
    deadline = time.monotonic() + wait_s
    with _typed_errors():
        folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder() / f".{name}.lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not _try_lock(lock):
            if time.monotonic() >= deadline:
                waited = f", waited for {wait_s:g} s" if wait_s else ""
                raise SpecError(f"name: another command is starting or stopping a deployment {name!r}{waited}")
            time.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(lock)


def write(record: Record) -> None:
    partial = folder() / f".{record.name}.{os.getpid()}"
    with _typed_errors():
        folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        partial.touch(mode=0o600)
        partial.write_bytes(msgspec.json.encode(record))
        partial.replace(_path(record.name))


def remove(record: Record) -> None:
    """Not one that another start of that name has written meanwhile."""
    if is_there(record):
        with _typed_errors():
            _path(record.name).unlink(missing_ok=True)


def is_there(record: Record) -> bool:
    return (present := _read(_path(record.name))) is not None and present.is_of(record)


def read_all() -> list[Record]:
    """Records whose Ray head has died are removed, and what is left of it."""
    found = [record for path in sorted(folder().glob("*.json")) if (record := _read(path)) is not None]
    for record in found:
        if record.head is not None and not record.head.is_alive:
            stop_head(record.head)
            remove(record)
            sweep_shared_memory(record.name)
    return [record for record in found if record.head is None or record.head.is_alive]


def find(name: str | None) -> Record | None:
    """By its name; without one, the only one there is. Raises ClusterError if there are several."""
    records = read_all()
    if name is None and len(records) > 1:
        raise ClusterError(f"which deployment? {', '.join(record.name for record in records)}")
    return next((record for record in records if name in (None, record.name)), None)


def shared_memory_of(name: str) -> list[Path]:
    """Its segments, dead workers' among them, and perhaps those of a deployment whose name begins alike."""
    return list(SHM.glob(f"diptych-{name}-*"))


def sweep_shared_memory(name: str) -> int:
    """Workers remove their own; this is for those that were killed and not replaced. Returns how many segments are removed."""
    if not shared_memory_of(name):
        return 0
    from ..kvtransfer.shm import sweep_orphans  # torch comes with it, which is why we look first

    return len(sweep_orphans(name))


def _path(name: str) -> Path:
    return folder() / f"{name}.json"


def _read(path: Path) -> Record | None:
    """None: it has been removed."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise ClusterError(f"{path}: no record of a deployment: {error}") from None


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _typed_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ClusterError(f"{error.filename or folder()}: {error.strerror}; deployments are recorded there") from None
