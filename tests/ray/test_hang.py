"""A member whose own threads stand still while Ray's go on answering for it: they are stopped one by one, as a debugger would."""

import ctypes
import os
from pathlib import Path

import pytest

from diptych.cluster.pulse import DeploymentStatus

from .conftest import Cluster, StartCluster

ATTACH, ALL_THREADS = 16, 0x40000000          # PTRACE_ATTACH, __WALL
STALL_S = 3.0
libc = ctypes.CDLL(None, use_errno=True)


def own_threads(pid: int) -> list[int]:
    """Those that the actor has started: Ray had named it after the deployment by then. Not the main thread, which answers calls."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(task.name) for task in tasks if int(task.name) != pid and (task / "comm").read_text().startswith("ray::diptych")]


def stop(thread_id: int) -> None:
    if libc.ptrace(ATTACH, thread_id, None, None):
        pytest.skip(f"threads cannot be stopped here: {os.strerror(ctypes.get_errno())}")
    os.waitpid(thread_id, ALL_THREADS)


def assert_replaced(served: Cluster, name: str) -> None:
    before = served.place(name)
    assert before.pid is not None
    threads = own_threads(before.pid)
    assert threads
    for thread_id in threads:
        stop(thread_id)

    def said(status: DeploymentStatus) -> str:
        return next(place.error for place in status.places if place.name == name)

    error = said(served.wait_for(lambda status: said(status) != ""))
    assert error.startswith(("its loop has stood still", "no answer")), "the latter if a thread was stopped while it held Python's lock"
    assert served.wait_until_back(before).pid != before.pid


def test_who_stands_still_is_replaced(cluster: StartCluster) -> None:
    served = cluster(pools={"decode": {"workers": 1, "kv_memory": "32MiB"}}, timeouts={"stall_s": STALL_S})
    served.complete()
    assert_replaced(served, "decode-0")
    served.complete()
    assert_replaced(served, "gateway-0")
