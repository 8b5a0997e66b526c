"""Wires between members of one host: frames whole and in order, strangers hung up on, and nothing that blocks or is left behind."""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.messages import host_wire
from diptych.messages.errors import ClusterError
from diptych.messages.host_wire import SIZE, HostWires
from diptych.messages.ids import Address

PUBLIC, SECRET = "p" * 40, "s" * 40
MAX_FRAME_BYTES, MAX_QUEUED = 1 << 20, 50
TIMEOUT_S = 10.0


def new_address() -> Address:
    return Address(f"tcp://{uuid4().hex}:1")


def wires_at(address: Address, secret: str = SECRET, public: str = PUBLIC) -> HostWires:
    return HostWires(address, public, secret, MAX_FRAME_BYTES, MAX_QUEUED)


class End:
    def __init__(self) -> None:
        self.address = new_address()
        self.wires = wires_at(self.address)

    def close(self) -> None:
        self.wires.close(0.0)


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


def say(sender: End, receiver: End, frame: bytes) -> None:
    assert sender.wires.reaches(receiver.address)
    assert sender.wires.send(receiver.address, frame)


def received(receiver: End, count: int, sender: End | None = None) -> list[bytes]:
    frames: list[bytes] = []
    give_up_at = time.monotonic() + TIMEOUT_S
    while len(frames) < count:
        assert time.monotonic() < give_up_at, f"{len(frames)} of {count} frames came"
        select.select([receiver.wires], [], [], 0.01)
        frames += receiver.wires.receive()
        if sender is not None:
            assert sender.wires.receive() == []
    return frames


def until(condition: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.001)


@given(st.lists(st.one_of(st.binary(max_size=50), st.integers(0, MAX_FRAME_BYTES).map(bytes)), max_size=20))
def test_frames_arrive_whole_and_in_order(frames: list[bytes]) -> None:
    a, b = End(), End()
    try:
        for frame in frames:
            say(a, b, frame)
        assert received(b, len(frames), a) == frames
        assert b.wires.num_dropped == a.wires.num_dropped == 0
    finally:
        a.close()
        b.close()


def test_both_ways_and_to_oneself(ends: tuple[End, End]) -> None:
    a, b = ends
    for sender, receiver in ((a, b), (b, a), (a, a)):
        say(sender, receiver, b"hello")
        assert received(receiver, 1) == [b"hello"]


def test_readable_while_there_is_something_and_only_then(ends: tuple[End, End]) -> None:
    a, b = ends
    say(a, b, b"first")
    received(b, 1)
    assert select.select([b.wires], [], [], 0)[0] == []
    say(a, b, b"next")
    assert select.select([b.wires], [], [], TIMEOUT_S)[0] == [b.wires]
    assert b.wires.receive() == [b"next"]
    assert select.select([a.wires, b.wires], [], [], 0)[0] == []


def test_a_peer_that_does_not_look_costs_no_more_than_its_queue(ends: tuple[End, End]) -> None:
    a, b = ends
    taken = 0
    while a.wires.reaches(b.address) and a.wires.send(b.address, taken.to_bytes(4, "little") + bytes(10_000)):
        taken += 1
        assert taken < 1000
    assert taken >= MAX_QUEUED
    assert [int.from_bytes(frame[:4], "little") for frame in received(b, taken, a)] == list(range(taken))
    say(a, b, b"room again")
    assert received(b, 1) == [b"room again"]


@pytest.mark.parametrize("missing", ["nobody", "gone"])
def test_who_is_not_of_this_host_is_not_reached_and_may_be_later(ends: tuple[End, End], missing: str) -> None:
    a, b = ends
    address = new_address()
    if missing == "gone":
        successor = wires_at(address)
        assert a.wires.reaches(address)
        successor.close(0.0)
        until(lambda: not a.wires.send(address, b"into the void") if address in a.wires._outgoing else True)
    assert not a.wires.reaches(address)
    successor = wires_at(address)
    try:
        assert not a.wires.reaches(address), "frames on two ways would overtake each other"
        a.wires.forget(address)
        assert a.wires.reaches(address)
    finally:
        successor.close(0.0)
    say(a, b, b"still here")
    assert received(b, 1) == [b"still here"]


def test_a_killed_peer_is_noticed_without_sending(ends: tuple[End, End]) -> None:
    a, _ = ends
    address = new_address()
    program = (
        "import sys, time; from diptych.messages.host_wire import HostWires; "
        f"w = HostWires({address!r}, {PUBLIC!r}, {SECRET!r}, 1 << 20, 50); print('up', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as peer:
        assert peer.stdout is not None
        assert peer.stdout.readline() == b"up\n"
        assert a.wires.reaches(address)
        peer.send_signal(signal.SIGKILL)
    until(lambda: bool(select.select([a.wires], [], [], 0)[0]))
    assert a.wires.receive() == []
    assert not a.wires.reaches(address)
    assert select.select([a.wires], [], [], 0)[0] == [], "an end that is over would wake its loop for ever"
    wires_at(address).close(0.0)                                   # and nothing of it is left


def framed(*frames: bytes) -> bytes:
    return b"".join(SIZE.pack(len(frame)) + frame for frame in frames)


@pytest.mark.parametrize(
    "said",
    [framed(b"no proof"), framed(b""), framed(bytes(32), b"frame"), SIZE.pack(MAX_FRAME_BYTES + 1), b"\xff" * 100],
    ids=["a frame", "empty", "zeros", "too large", "bytes"],
)
def test_a_stranger_is_hung_up_on(ends: tuple[End, End], stranger: socket.socket, said: bytes) -> None:
    a, b = ends
    stranger.connect(b.wires._name(b.address))
    stranger.sendall(said)
    until(lambda: b.wires.receive() == [] and b.wires.num_dropped == 1)
    with suppress(ConnectionResetError):                           # it had said more than was read
        assert stranger.recv(1) == b""
    say(a, b, b"frame")
    assert received(b, 1) == [b"frame"]


@pytest.mark.parametrize(("secret", "public"), [("x" * 40, PUBLIC), (SECRET, "x" * 40)], ids=["secret", "public"])
def test_another_clusters_member_gets_no_word_in(ends: tuple[End, End], secret: str, public: str) -> None:
    other = wires_at(new_address(), secret, public)
    try:
        if other.reaches(ends[1].address):
            other.send(ends[1].address, b"frame")
        assert ends[1].wires.receive() == []
        assert ends[1].wires.num_dropped == (public == PUBLIC)
    finally:
        other.close(0.0)


def test_a_proof_for_one_member_is_none_for_another(ends: tuple[End, End], stranger: socket.socket) -> None:
    a, b = ends
    stranger.connect(b.wires._name(b.address))
    stranger.sendall(framed(b.wires._proof(a.address), b"frame"))
    until(lambda: b.wires.receive() == [] and b.wires.num_dropped == 1)


@pytest.mark.parametrize("who", ["listener", "caller"])
def test_another_users_process_is_refused(ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    a, b = ends
    real, calls = os.geteuid(), iter([real_or_other(who == "caller"), real_or_other(who == "listener")])
    monkeypatch.setattr(host_wire.os, "geteuid", lambda: next(calls, real))
    assert a.wires.reaches(b.address) is (who == "listener")       # the caller asks first
    assert b.wires.receive() == []
    if who == "listener":
        assert b.wires.num_dropped == 1
        until(lambda: a.wires.receive() == [] and not a.wires.reaches(b.address))


def real_or_other(other: bool) -> int:
    return os.geteuid() + other


def test_last_words_arrive_and_are_waited_for_no_longer_than_told(ends: tuple[End, End]) -> None:
    _, b = ends
    for words, linger_s in ((b"small", TIMEOUT_S), (bytes(MAX_FRAME_BYTES), 0.05)):        # nobody reads meanwhile
        leaver = End()
        say(leaver, b, words)
        started = time.monotonic()
        leaver.wires.close(linger_s)
        assert time.monotonic() - started < TIMEOUT_S / 2
    assert received(b, 1) == [b"small"]


def test_an_address_that_is_taken_is_a_typed_error(ends: tuple[End, End]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ClusterError, match="Address already in use"):
        wires_at(ends[0].address)
    assert len(os.listdir("/proc/self/fd")) == before


def test_close_leaves_no_file_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    a, b = End(), End()
    say(a, b, b"frame")
    received(b, 1)
    a.close()
    b.close()
    assert len(os.listdir("/proc/self/fd")) == before
