"""Two ends of wires between members of one host, and what is said over them."""

import select
import time
from collections.abc import Callable
from uuid import uuid4

from diptych.messages.host_wire import HostWires
from diptych.messages.ids import Address

PUBLIC, SECRET = "p" * 40, "s" * 40
MAX_FRAME_BYTES, MAX_QUEUED = 1 << 20, 50
TIMEOUT_S = 10.0
GIVEN_BACK: dict[Address, list[bytes]] = {}


def new_address() -> Address:
    return Address(f"tcp://{uuid4().hex}:1")


def wires_at(address: Address, secret: str = SECRET, public: str = PUBLIC) -> HostWires:
    return HostWires(address, public, secret, MAX_FRAME_BYTES, MAX_QUEUED, GIVEN_BACK.__setitem__)


class End:
    def __init__(self) -> None:
        self.address = new_address()
        self.wires = wires_at(self.address)

    def close(self) -> None:
        self.wires.close(0.0)


def say(sender: End, receiver: End, frame: bytes) -> None:
    assert sender.wires.reaches(receiver.address)
    assert sender.wires.send(receiver.address, frame)


def received(receiver: End, count: int, sender: End) -> list[bytes]:
    frames: list[bytes] = []
    give_up_at = time.monotonic() + TIMEOUT_S
    while len(frames) < count:
        assert time.monotonic() < give_up_at, f"{len(frames)} of {count} frames came"
        select.select([receiver.wires, sender.wires], [], [], 0.01)
        frames += receiver.wires.receive()
        if sender is not receiver:
            assert sender.wires.receive() == []
    return frames


def meet(a: End, b: End) -> None:
    say(a, b, b"hello")
    assert received(b, 1, a) == [b"hello"]


def until(condition: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.001)


def fill(sender: End, receiver: End) -> int:
    """More than the kernel takes. → frames."""
    count = 0
    while len(sender.wires._outgoing[receiver.address].queued) < 3:
        say(sender, receiver, bytes(MAX_FRAME_BYTES))
        count += 1
    return count
