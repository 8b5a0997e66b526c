"""Whether a process of another host is gone: asked of a warden there. Here the one host is taken for another."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from diptych.cluster.processes import began_s
from diptych.cluster.ray_join import join
from diptych.cluster.ray_session import _check_hosts
from diptych.cluster.records import Record
from diptych.cluster.spec import parse_spec
from diptych.messages.errors import ClusterError

if TYPE_CHECKING:
    from diptych.cluster.ray_nodes import Nodes

TIMEOUT_S = 30.0


@pytest.fixture
def child() -> Iterator["subprocess.Popen[bytes]"]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield child
    child.kill()
    child.wait(10)


@pytest.fixture
def nodes(ray_head: str) -> "Nodes":
    join(Record("nodes", ray_head, None))
    from diptych.cluster.ray_nodes import Nodes

    return Nodes("the controller's")


def answer(nodes: "Nodes", node_id: str, pid: int, began: float, end_it: bool) -> bool:
    """The first that is not a mere "not known yet": a warden answers within the time, or there is none any more."""
    key, deadline = (node_id, pid, began), time.monotonic() + TIMEOUT_S
    while True:
        gone = nodes.is_gone(node_id, pid, began, end_it)
        if gone or key not in nodes._asked:
            return gone
        assert time.monotonic() < deadline, "the warden does not answer"
        time.sleep(0.02)


def test_a_process_elsewhere_is_gone_once_its_warden_says_so(nodes: "Nodes", child: "subprocess.Popen[bytes]") -> None:
    from diptych.cluster.ray_nodes import here

    node_id, began = here().node_id, began_s(child.pid)
    assert not answer(nodes, node_id, child.pid, began, end_it=False)
    assert child.poll() is None
    assert not answer(nodes, node_id, child.pid, began, end_it=True), "it was there when it was looked at"
    assert child.wait(10) == -9
    assert answer(nodes, node_id, child.pid, began, end_it=False)


def test_a_number_that_is_somebody_elses_by_now_is_left_alone_there_too(nodes: "Nodes") -> None:
    from diptych.cluster.ray_nodes import here

    process = psutil.Process()
    assert answer(nodes, here().node_id, process.pid, began_s(process.pid) - 1.0, end_it=True)


def test_with_a_host_that_ray_has_given_up_its_processes_are_gone(nodes: "Nodes", child: "subprocess.Popen[bytes]") -> None:
    assert answer(nodes, "e" * 56, child.pid, began_s(child.pid), end_it=True)
    assert child.poll() is None


def test_a_warden_that_died_is_replaced_and_proves_nothing(nodes: "Nodes", child: "subprocess.Popen[bytes]") -> None:
    import ray

    from diptych.cluster.ray_nodes import here

    node_id, began = here().node_id, began_s(child.pid)
    assert not answer(nodes, node_id, child.pid, began, end_it=False)
    ray.kill(nodes._wardens[node_id])
    assert not answer(nodes, node_id, child.pid, began, end_it=False), "the host is there"
    assert not answer(nodes, node_id, child.pid, began, end_it=False), "told by a new one"
    assert child.poll() is None


@pytest.mark.parametrize(
    ("pool", "text"),
    [
        ({"node": "rack"}, "pools.decode.node: none of the 1 hosts of this Ray cluster offers 'rack'"),
        ({"num_threads": 3}, "pools.decode.num_threads: 3, but no host has more than 2 CPUs that Ray may give"),
        ({"num_threads": 2}, ""),
    ],
)
def test_what_no_host_has_is_refused_before_anything_starts(ray_head: str, pool: dict[str, Any], text: str, tmp_path: Path) -> None:
    join(Record("nodes", ray_head, None))
    tree = {"name": "nodes", "model": {"path": "embedded"}, "hosts": "any", "pools": {"decode": {"workers": 1, **pool}}}
    try:
        _check_hosts(parse_spec(tree, tmp_path))
        said = ""
    except ClusterError as error:
        said = str(error)
    assert said == text
