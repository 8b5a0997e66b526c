"""Is that process still there? Asked of the process table, since everything else may be late or wrong."""

import contextlib

import psutil


def find_process(pid: int, created_s: float) -> psutil.Process | None:
    """The process of that number that began then: together they name one process for ever."""
    try:
        process = psutil.Process(pid)
        return process if abs(process.create_time() - created_s) < 0.01 else None
    except psutil.NoSuchProcess:
        return None


def is_dead(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def kill(process: psutil.Process) -> None:
    """Without effect on one that went by itself meanwhile."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
