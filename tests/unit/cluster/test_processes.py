"""The process table changes while one looks at it."""

import os
import platform
import subprocess
import sys
import time

import psutil
import pytest

from diptych.cluster.processes import began_s, find_process, is_dead, kill


def sleeper() -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def test_a_process_that_ends_just_before_the_signal_is_no_fault() -> None:
    """Or the controller, which kills what does not leave, would end with it."""
    child = sleeper()
    running = find_process(child.pid, began_s(child.pid))
    assert running is not None
    child.kill()
    child.wait(10)
    kill(running)
    assert is_dead(running)


def test_setting_the_clock_changes_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the controller would take a process that hangs for gone, and let another use what it may still write to."""
    child = sleeper()
    then_s = began_s(child.pid)
    boot_time = psutil.boot_time()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot_time + 3600.0)
    running = find_process(child.pid, then_s)
    assert running is not None
    assert not is_dead(running)
    assert find_process(child.pid, then_s - 0.01) is None
    kill(running)
    child.wait(10)
    assert find_process(child.pid, then_s) is None


def test_a_process_that_lives_is_killed() -> None:
    child = sleeper()
    kill(psutil.Process(child.pid))
    assert child.wait(10) == -9


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of the system call is x86-64's")
def test_who_goes_on_without_its_first_thread_lives() -> None:
    """So does a worker that is killed while its own thread is in the driver: what it has under way may still land."""
    code = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
ctypes.CDLL(None).syscall(60, 0)              # exit(2): of this thread alone
"""
    child = subprocess.Popen([sys.executable, "-c", code])
    running = psutil.Process(child.pid)
    deadline = time.monotonic() + 10
    while running.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not is_dead(running)
    kill(running)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)   # it is left unreaped
    assert running.status() == psutil.STATUS_ZOMBIE
    assert is_dead(running)
    child.wait(10)
    assert is_dead(running)
