"""The process table changes while one looks at it."""

import subprocess
import sys

import psutil
import pytest

from diptych.cluster import ray_runtime
from diptych.cluster.places import PlaceKind, PlaceName
from diptych.cluster.pulse import Pulse, ShellState
from diptych.messages.ids import Epoch


def sleeper() -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def test_a_process_that_ends_just_before_the_signal_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the controller would end with it."""
    child = sleeper()
    running = psutil.Process(child.pid)
    child.kill()
    child.wait(10)
    monkeypatch.setattr(ray_runtime, "find_process", lambda pid, created_s: running)
    monkeypatch.setattr(ray_runtime, "is_dead", lambda process: False)       # as of a moment ago
    life = ray_runtime._Process(PlaceName(PlaceKind.DECODE, 0), Epoch(1), actor=None)
    life.pulse, life.dying, life.lost = Pulse(child.pid, 0.0, ShellState.SERVING), "told to", True
    runtime = ray_runtime.RayRuntime(spec=None, keyring=None, node_id="", node_ip="")
    assert not runtime._is_gone(life, now_s=1.0)


def test_a_process_that_lives_is_killed() -> None:
    child = sleeper()
    ray_runtime.kill(psutil.Process(child.pid))
    assert child.wait(10) == -9
