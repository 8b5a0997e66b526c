"""Stopping a head: its whole session and nobody else, whatever state it is in. A head is played by a process that has a child."""

import subprocess
import sys
from pathlib import Path

import psutil

from diptych.cluster.processes import began_s, is_dead
from diptych.cluster.ray_head import Head, stop_head

PARENT = """
import subprocess, sys, time
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def play_head(folder: Path) -> tuple[Head, psutil.Process, psutil.Process]:
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    leader = psutil.Process(process.pid)
    return Head(process.pid, began_s(process.pid), "127.0.0.1:1", str(folder)), leader, child


def test_stops_the_session_and_removes_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "ray"
    folder.mkdir()
    head, leader, child = play_head(folder)
    assert head.is_alive
    stop_head(head)
    assert is_dead(leader)
    assert is_dead(child), "it ignores SIGTERM"
    assert not head.is_alive
    assert not folder.exists()


def test_tidies_up_after_a_dead_leader(tmp_path: Path) -> None:
    head, leader, child = play_head(tmp_path / "ray")
    leader.kill()
    leader.wait(5)
    stop_head(head)
    assert is_dead(child)


LATE = """
import signal, subprocess, sys, time
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"

def end(*_):
    child = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
    child.stdout.readline()
    print(child.pid, flush=True)
    sys.exit()

signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""


def test_stops_who_is_started_on_the_way_down(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", LATE], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    stop_head(Head(process.pid, began_s(process.pid), "127.0.0.1:1", str(tmp_path / "ray")))
    late = int(process.stdout.readline())
    assert not psutil.pid_exists(late) or is_dead(psutil.Process(late))


def test_never_touches_another_process_of_that_number(tmp_path: Path) -> None:
    head, leader, child = play_head(tmp_path / "ray")
    stop_head(Head(head.pid, head.began_s - 100, head.address, head.folder))
    assert not is_dead(leader)
    assert not is_dead(child)
    stop_head(head)
