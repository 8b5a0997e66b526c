"""What a gateway's process answers its controller while its loop is busy, or hangs."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from harness.gateway import MODEL, make_model

from diptych.cluster import gateway_shell
from diptych.cluster.gateway import server
from diptych.cluster.gateway.config import GatewayConfig
from diptych.cluster.gateway_shell import GatewayShell
from diptych.cluster.places import PlaceKind, PlaceName
from diptych.cluster.pulse import Pulse, ShellState
from diptych.cluster.spec import Spec
from diptych.messages.ids import GatewayId
from diptych.messages.zmq_post import Keyring

LIMIT_S = 20.0
BUSY_S = 0.2


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> GatewayShell:
    config = GatewayConfig(GatewayId("gateway-0"), "test", str(make_model(tmp_path)), MODEL)
    monkeypatch.setattr(gateway_shell, "gateway_config", lambda spec, place, any_port=0: config)
    monkeypatch.setattr(gateway_shell, "LISTEN_PERIOD_S", 0.001)
    monkeypatch.setattr(server, "LOOP_ANSWER_S", 0.01)
    return GatewayShell(Spec.model_construct(), PlaceName(PlaceKind.GATEWAY, 0), Keyring.new())


def pulse_when(shell: GatewayShell, condition: Callable[[Pulse], bool]) -> Pulse:
    deadline = time.monotonic() + LIMIT_S
    while not condition(pulse := msgspec.msgpack.decode(shell.pulse(), type=Pulse)):
        assert time.monotonic() < deadline, pulse
        time.sleep(0.002)
    return pulse


def test_a_loop_that_does_not_answer_is_told_of_by_one_that_does(shell: GatewayShell) -> None:
    before = pulse_when(shell, lambda pulse: pulse.state is ShellState.SERVING and shell._gateway._loop is not None)
    freed = threading.Event()
    with pytest.raises(TimeoutError):
        shell._gateway._on_loop(lambda: freed.wait(LIMIT_S))
    while_busy = pulse_when(shell, lambda pulse: pulse.still_s > BUSY_S)
    assert (while_busy.state, while_busy.pid, while_busy.address) == (ShellState.SERVING, before.pid, before.address)
    assert while_busy.gateway is not None
    freed.set()
    pulse_when(shell, lambda pulse: pulse.still_s < BUSY_S)
    shell.leave()
    pulse_when(shell, lambda pulse: pulse.state is ShellState.ENDED)


def test_a_status_that_fails_is_logged_and_the_next_one_told(
    shell: GatewayShell, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pulse_when(shell, lambda pulse: pulse.state is ShellState.SERVING)
    with monkeypatch.context() as failing:
        failing.setattr(shell._gateway, "status", lambda: 1 / 0)
        pulse_when(shell, lambda pulse: pulse.still_s > BUSY_S)
    pulse_when(shell, lambda pulse: pulse.still_s < BUSY_S)
    assert "gateway-0 has no status to tell" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    shell.leave()
    pulse_when(shell, lambda pulse: pulse.state is ShellState.ENDED)
