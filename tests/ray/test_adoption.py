"""A controller takes over from one that died: what it knows of processes that Ray does not speak of, or no more."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from diptych.cluster.lives import Adopted, Died
from diptych.cluster.places import PlaceKind, PlaceName
from diptych.cluster.processes import began_s, find_process, is_dead
from diptych.cluster.ray_join import join
from diptych.cluster.records import Record
from diptych.cluster.spec import parse_spec
from diptych.messages.ids import Epoch
from diptych.messages.zmq_post import Keyring

if TYPE_CHECKING:
    from diptych.cluster.ray_runtime import RayRuntime  # Ray reads its token's place when it is imported

D0, EPOCH = PlaceName(PlaceKind.DECODE, 0), Epoch(7)


@pytest.fixture
def runtime(ray_head: str, tmp_path: Path) -> Iterator["RayRuntime"]:
    from diptych.cluster.ray_runtime import RayRuntime, traces_of

    join(Record("traced", ray_head, None))
    spec = parse_spec({"name": "traced", "model": {"path": "embedded"}, "pools": {"decode": {"workers": 1}}}, tmp_path)
    yield RayRuntime(spec, Keyring.new(), "", "")
    assert traces_of("traced") == {}


def leave_trace(pid: int, began: float) -> None:
    from diptych.cluster.ray_runtime import Trace, write_trace

    write_trace("traced", D0, EPOCH, Trace(pid, began, served=True))


def test_who_outlives_its_actor_is_dead_once_its_process_is(runtime: "RayRuntime") -> None:
    """The earlier controller told Ray to kill it, and died before it was gone."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    began = began_s(child.pid)
    leave_trace(child.pid, began)
    assert [(event.name, event.epoch) for event in runtime.adopt() if isinstance(event, Adopted)] == [(D0, EPOCH)]
    assert runtime.poll(0.0) == [], "it is there"
    deadline = time.monotonic() + 10
    while not (events := runtime.poll(0.1)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running = find_process(child.pid, began)
    assert running is None or is_dead(running)
    assert [type(event) for event in events] == [Died]
    assert child.wait(10) == -9


def test_a_number_that_is_somebody_elses_by_now_is_left_alone(runtime: "RayRuntime") -> None:
    here = psutil.Process()
    leave_trace(here.pid, began_s(here.pid) - 1.0)
    runtime.adopt()
    assert [type(event) for event in runtime.poll(0.0)] == [Died]
