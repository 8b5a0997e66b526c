"""Where a process stands, and whether it is still there: asked of the process table, since everything else may be late or wrong."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

STARTTIME = 19                                # of /proc/PID/stat, counted from behind the name


class Standing(NamedTuple):
    """Where a process stands."""

    node_id: str                              # Ray's name of the host
    address: str                              # under which other hosts reach it


def nowhere() -> Standing:
    """Of a process that Ray knows nothing of."""
    return Standing("", "127.0.0.1")


def began_s(pid: int) -> float:
    """When the process began, since boot: a time of day would change when the clock is set. Raises psutil.NoSuchProcess."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    return int(fields[STARTTIME]) / os.sysconf("SC_CLK_TCK")


def find_process(pid: int, then_s: float) -> psutil.Process | None:
    """The process of that number that began then: together they name one process for ever."""
    try:
        process = psutil.Process(pid)
        return process if began_s(pid) == then_s else None
    except psutil.NoSuchProcess:
        return None


def is_dead(process: psutil.Process) -> bool:
    """The table shows a zombie as soon as the first thread has ended; the others may go on, and write."""
    try:
        return not process.is_running() or not any(_goes_on(thread) for thread in Path(f"/proc/{process.pid}/task").iterdir())
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return True


def _goes_on(thread: Path) -> bool:
    """One that has ended stays in the table while a debugger has not noticed."""
    try:
        return (thread / "stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextlib.contextmanager
def held_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP wait until the end; threads that begin meanwhile never take one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def kill(process: psutil.Process) -> None:
    """Without effect on one that went by itself meanwhile."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
