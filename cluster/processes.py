"""Is that process still there? Asked of the process table, since everything else may be late or wrong."""

import contextlib
import os
from pathlib import Path

import psutil

STARTTIME = 19                                # of /proc/PID/stat, counted from behind the name


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
        return not process.is_running() or (process.status() == psutil.STATUS_ZOMBIE and _num_threads(process.pid) <= 1)
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return True


def _num_threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def kill(process: psutil.Process) -> None:
    """Without effect on one that went by itself meanwhile."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
