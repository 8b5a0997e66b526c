"""What a worker's process answers of its loop."""

import threading

import msgspec
import pytest
from harness.fake_cluster import FakeCluster

from diptych.cluster import worker_shell
from diptych.cluster.pulse import Pulse, ShellState
from diptych.cluster.worker_shell import WorkerShell
from diptych.messages.ids import WorkerId
from diptych.messages.zmq_post import Keyring


def test_a_pulse_says_for_how_long_the_loop_has_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster()
    worker, runs = cluster.workers[WorkerId("decode-0")], threading.Event()
    monkeypatch.setattr(worker, "run", runs.set)                    # the test turns the loop
    monkeypatch.setattr(worker_shell, "make_worker", lambda *arguments: worker)
    monkeypatch.setattr(WorkerShell, "close", lambda shell: threading.Event().wait())       # it goes on serving
    shell = WorkerShell(worker.role, worker.config, Keyring.new())
    assert runs.wait(20.0)

    def pulse() -> Pulse:
        return msgspec.msgpack.decode(shell.pulse(), type=Pulse)

    assert (pulse().state, pulse().still_s) == (ShellState.SERVING, 0.0)
    cluster.now += 100.0                                            # its loop hangs, and this thread answers all the same
    assert pulse().still_s == 100.0
    worker.turn(0.0)
    assert pulse().still_s == 0.0
