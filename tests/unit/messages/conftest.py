"""Two members of one host, and somebody who is none."""

import socket
from collections.abc import Iterator

import pytest
from harness.host_wires import TIMEOUT_S, End


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    a, b = End(), End()
    yield a, b
    a.close()
    b.close()


@pytest.fixture
def stranger() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connected:
        connected.settimeout(TIMEOUT_S)
        yield connected
