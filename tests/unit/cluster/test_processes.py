"""The process table changes while one looks at it."""

import subprocess
import sys

import psutil

from diptych.cluster.processes import find_process, is_dead, kill


def sleeper() -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def test_a_process_that_ends_just_before_the_signal_is_no_fault() -> None:
    """Or the controller, which kills what does not leave, would end with it."""
    child = sleeper()
    running = find_process(child.pid, psutil.Process(child.pid).create_time())
    assert running is not None
    child.kill()
    child.wait(10)
    kill(running)
    assert is_dead(running)


def test_a_process_that_lives_is_killed() -> None:
    child = sleeper()
    kill(psutil.Process(child.pid))
    assert child.wait(10) == -9
