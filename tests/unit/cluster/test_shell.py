"""A member's process, with a member that does what the test says; what ends a process runs in a process."""

import subprocess
import sys
import threading
import time

import msgspec
import pytest

from diptych.cluster.pulse import Pulse, ShellState
from diptych.cluster.shell import EXIT_FAULT, Shell
from diptych.messages.errors import ModelError
from diptych.messages.ids import Address
from diptych.messages.membership import Membership
from diptych.messages.zmq_post import Keyring, ZmqPost


class FakeShell(Shell):
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.stopped = threading.Event()
        self.heard: list[Membership] = []
        self.num_drains = self.num_closes = 0
        super().__init__(Keyring.new(), "127.0.0.1")

    def build(self, post: ZmqPost) -> None:
        if self.error is not None:
            raise self.error

    def run(self) -> None:
        self.stopped.wait(10)

    def close(self) -> None:
        self.num_closes += 1

    def stop(self) -> None:
        self.stopped.set()

    def begin_drain(self) -> None:
        self.num_drains += 1

    def tell(self, membership: Membership) -> None:
        self.heard.append(membership)

    def describe(self, pulse: Pulse) -> Pulse:
        return msgspec.structs.replace(pulse, address=Address("tcp://here"))


def wait_for(shell: Shell, state: ShellState) -> Pulse:
    deadline = time.monotonic() + 10
    while (pulse := msgspec.msgpack.decode(shell.pulse(), type=Pulse)).state is not state:
        assert time.monotonic() < deadline, pulse
        time.sleep(0.005)
    return pulse


def test_a_life_in_order() -> None:
    shell = FakeShell()
    first = wait_for(shell, ShellState.SERVING)
    assert (first.address, first.heard.version) == ("tcp://here", -1)
    news = Membership(3, (), ())
    shell.update_membership(msgspec.msgpack.encode(news))
    assert shell.heard == [news]
    assert wait_for(shell, ShellState.SERVING).heard.version == 3
    shell.drain()
    assert shell.num_drains == 1
    shell.leave()
    assert wait_for(shell, ShellState.ENDED).drained
    assert shell.num_closes == 1
    shell.leave()
    shell.drain()
    assert shell.num_drains == 1


@pytest.mark.parametrize(("error", "is_typed"), [(ModelError("lm_head.weight is missing"), True), (OSError("odd"), False)])
def test_a_start_that_fails_is_told(error: Exception, is_typed: bool) -> None:
    pulse = wait_for(FakeShell(error), ShellState.FAILED)
    assert pulse.error == f"{type(error).__name__}: {error}"
    assert pulse.is_typed is is_typed


def test_a_fault_ends_the_process() -> None:
    code = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_shell import FakeShell
class Faulty(FakeShell):
    def run(self): raise AssertionError("free + cached != total")
Faulty()
time.sleep(20)
"""
    folder = __file__.rpartition("/")[0]
    ended = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == EXIT_FAULT
    assert "free + cached != total" in ended.stderr
