"""Wires between members of one host: frames whole and in order, strangers hung up on, and nothing that blocks or is left behind."""

import errno
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.messages import host_wire
from diptych.messages.errors import ClusterError
from diptych.messages.host_wire import (
    CHUNK_BYTES,
    MAX_ACCEPTED,
    MAX_CHUNKS,
    MAX_TOGETHER,
    MAX_UNPROVEN,
    NONCE_BYTES,
    PROOF_BYTES,
    SIZE,
    HostWires,
    _Incoming,
)
from diptych.messages.ids import Address

PUBLIC, SECRET = "p" * 40, "s" * 40
MAX_FRAME_BYTES, MAX_QUEUED = 1 << 20, 50
TIMEOUT_S = 10.0
FRAMES = st.lists(st.one_of(st.binary(max_size=50), st.integers(0, MAX_FRAME_BYTES).map(bytes)), max_size=20)


def new_address() -> Address:
    return Address(f"tcp://{uuid4().hex}:1")


GIVEN_BACK: dict[Address, list[bytes]] = {}


def wires_at(address: Address, secret: str = SECRET, public: str = PUBLIC) -> HostWires:
    return HostWires(address, public, secret, MAX_FRAME_BYTES, MAX_QUEUED, GIVEN_BACK.__setitem__)


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


@given(FRAMES)
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
        meet(sender, receiver)


def test_readable_while_there_is_something_and_only_then(ends: tuple[End, End]) -> None:
    a, b = ends
    meet(a, b)
    assert select.select([b.wires], [], [], 0)[0] == []
    say(a, b, b"next")
    assert select.select([b.wires], [], [], TIMEOUT_S)[0] == [b.wires]
    assert b.wires.receive() == [b"next"]
    assert select.select([a.wires, b.wires], [], [], 0)[0] == []


def test_a_peer_that_does_not_look_costs_no_more_than_its_queue(ends: tuple[End, End]) -> None:
    a, b = ends
    meet(a, b)
    taken = 0
    while a.wires.reaches(b.address) and a.wires.send(b.address, taken.to_bytes(4, "little") + bytes(10_000)):
        taken += 1
        assert taken < 1000
    assert taken >= MAX_QUEUED
    assert [int.from_bytes(frame[:4], "little") for frame in received(b, taken, a)] == list(range(taken))
    meet(a, b)


def test_a_peer_that_floods_leaves_the_others_their_turn(ends: tuple[End, End]) -> None:
    a, b = ends
    meet(a, b)
    most = MAX_CHUNKS * CHUNK_BYTES
    end = next(end for end in b.wires._ends.values() if isinstance(end, _Incoming))
    flood = SimpleNamespace(recv=lambda size: bytes(size), fileno=end.socket.fileno)
    assert host_wire._read(SimpleNamespace(socket=flood, unread=(unread := bytearray()))) is False
    assert len(unread) == most


@pytest.mark.parametrize("missing", ["nobody", "gone"])
def test_who_is_not_of_this_host_is_not_reached_and_may_be_later(ends: tuple[End, End], missing: str) -> None:
    a, b = ends
    address = new_address()
    if missing == "gone":
        successor = wires_at(address)
        assert a.wires.reaches(address)
        a.wires.send(address, b"into the void")
        successor.close(0.0)
        a.wires.receive()
    assert not a.wires.reaches(address)
    successor = wires_at(address)
    try:
        assert not a.wires.reaches(address), "frames on two ways would overtake each other"
        a.wires.forget(address)
        assert a.wires.reaches(address)
    finally:
        successor.close(0.0)
    meet(a, b)


def test_a_killed_peer_is_noticed_without_sending(ends: tuple[End, End]) -> None:
    a, _ = ends
    address = new_address()
    program = (
        "import sys, time; from diptych.messages.host_wire import HostWires; "
        f"w = HostWires({address!r}, {PUBLIC!r}, {SECRET!r}, 1 << 20, 50, print); print('up', flush=True); time.sleep(60)"
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


def hung_up_on(stranger: socket.socket, end: End) -> bool:
    """Whatever was answered before."""
    stranger.setblocking(False)
    assert end.wires.receive() == []
    with suppress(BlockingIOError):
        try:
            while stranger.recv(1 << 16):
                pass
        except ConnectionResetError:                               # it had said more than was read
            pass
        return True
    return False


NONCE, PROOF = bytes(NONCE_BYTES), bytes(PROOF_BYTES)


@pytest.mark.parametrize(
    "said",
    [
        framed(b"no nonce"), framed(b""), framed(NONCE, PROOF), framed(NONCE, PROOF, b"frame"), framed(NONCE, b"frame"),
        SIZE.pack(MAX_FRAME_BYTES + 1), framed(NONCE) + SIZE.pack(1000) + bytes(999), b"\xff" * 100,
    ],
    ids=["a frame", "empty", "zeros", "zeros and a frame", "no proof", "too large", "large", "bytes"],
)  # fmt: skip
def test_a_stranger_is_hung_up_on(ends: tuple[End, End], stranger: socket.socket, said: bytes) -> None:
    a, b = ends
    stranger.connect(b.wires._name(b.address))
    stranger.sendall(said)
    until(lambda: hung_up_on(stranger, b))
    assert b.wires.num_dropped == 0
    meet(a, b)


def test_a_member_that_says_too_much_is_counted_and_hung_up_on(ends: tuple[End, End]) -> None:
    a, b = ends
    meet(a, b)
    a.wires._outgoing[b.address].socket.sendall(SIZE.pack(MAX_FRAME_BYTES + 1))
    until(lambda: b.wires.receive() == [] and a.wires.receive() == [] and not a.wires.reaches(b.address))
    assert b.wires.num_dropped == 1


@pytest.mark.parametrize(("secret", "public"), [("x" * 40, PUBLIC), (SECRET, "x" * 40)], ids=["secret", "public"])
def test_another_clusters_member_gets_no_word_in(ends: tuple[End, End], secret: str, public: str) -> None:
    _, b = ends
    other = wires_at(address := new_address(), secret, public)
    try:
        for one, to in ((other, b.address), (b.wires, address)):
            if one.reaches(to):
                one.send(to, b"frame")
        for _ in range(10):
            assert b.wires.receive() == other.receive() == []
        assert not other.reaches(b.address)
        assert not b.wires.reaches(address)
    finally:
        other.close(0.0)


def test_what_proves_one_connection_proves_no_other(ends: tuple[End, End], stranger: socket.socket) -> None:
    """Nor another name: somebody passes on, word for word, what a member said to a listener that he had made himself."""
    a, b = ends
    stranger.connect(b.wires._name(b.address))
    nonce = os.urandom(NONCE_BYTES)
    stranger.sendall(framed(nonce))
    b.wires.receive()
    theirs = stranger.recv(1000)[SIZE.size :][:NONCE_BYTES]
    for nonces, name in ((nonce + nonce, b.address), (nonce + theirs, a.address), (theirs + nonce, b.address)):
        assert b.wires._proof(b"caller", nonces, name) != b.wires._proof(b"caller", nonce + theirs, b.address)
    assert b.wires._proof(b"listener", nonce + theirs, b.address) != b.wires._proof(b"caller", nonce + theirs, b.address)
    stranger.sendall(framed(b.wires._proof(b"listener", nonce + theirs, b.address), b"frame"))
    until(lambda: hung_up_on(stranger, b))


@pytest.mark.parametrize("answer", [None, framed(bytes(NONCE_BYTES + PROOF_BYTES)), framed(b"short"), b"\xff" * 100], ids=str)
def test_who_took_the_name_of_one_that_died_reads_nothing(ends: tuple[End, End], answer: bytes | None) -> None:
    a, _ = ends
    address, read = new_address(), b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as forged:
        forged.bind(a.wires._name(address))
        forged.listen()
        assert a.wires.reaches(address)
        a.wires.send(address, b"secret prompt")
        connected, _ = forged.accept()
        with connected:
            connected.setblocking(False)
            if answer is not None:
                connected.sendall(answer)
            for _ in range(20):
                assert a.wires.receive() == []
                with suppress(BlockingIOError):
                    read += connected.recv(1000)
        assert read[: SIZE.size] == SIZE.pack(NONCE_BYTES)
        assert len(read) == SIZE.size + NONCE_BYTES
        a.wires.receive()
        assert not a.wires.reaches(address)
    assert GIVEN_BACK[address] == [b"secret prompt"]


def test_who_says_nothing_is_taken_for_nobody_in_time(ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = ends
    meet(a, b)
    monkeypatch.setattr(host_wire, "PROOF_S", 0.05)
    address = new_address()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as mute:
        mute.bind(a.wires._name(address))
        mute.listen()
        assert a.wires.reaches(address)
        for word in (b"one", b"two"):
            a.wires.send(address, word)
        a.wires.expire()
        assert a.wires.reaches(address)
        until(lambda: a.wires.expire() or not a.wires.reaches(address))
    assert GIVEN_BACK[address] == [b"one", b"two"]
    a.wires.expire()
    meet(a, b)


def test_mail_for_a_member_that_had_no_time_for_an_introduction_is_given_back(ends: tuple[End, End]) -> None:
    """It was hung up on because others came by the dozen meanwhile."""
    a, b = ends
    for word in (b"one", b"two"):
        say(a, b, word)
    with ExitStack() as opened:
        for _ in range(MAX_UNPROVEN + 10):
            opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)).connect(b.wires._name(b.address))
            assert b.wires.receive() == []
        assert a.wires.receive() == []
    assert not a.wires.reaches(b.address)
    assert GIVEN_BACK[b.address] == [b"one", b"two"]


def test_sending_alone_goes_on_once_there_is_room(ends: tuple[End, End]) -> None:
    a, b = ends
    meet(a, b)
    count = fill(a, b)
    frames: list[bytes] = []
    while len(frames) < count:
        frames += b.wires.receive()
        say(a, b, b"more")
        frames = [frame for frame in frames if frame != b"more"]
    assert len(frames) == count


class Loop:
    """What is to be called soon."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def call_soon(self, call: Callable[[], None]) -> None:
        self.calls.append(call)

    def turn(self) -> None:
        calls, self.calls = self.calls, []
        for call in calls:
            call()


class TestGathering:
    def test_frames_wait_for_one_another_within_a_turn(self, ends: tuple[End, End]) -> None:
        a, b = ends
        meet(a, b)
        loop = Loop()
        a.wires.gather(loop.call_soon)
        for word in (b"one", b"two", b"three"):
            say(a, b, word)
        assert len(loop.calls) == 1
        assert b.wires.receive() == []
        loop.turn()
        assert b.wires.receive() == [b"one", b"two", b"three"]
        say(a, b, b"four")
        assert len(loop.calls) == 1

    @pytest.mark.parametrize("number", [MAX_TOGETHER, 3 * MAX_TOGETHER])
    def test_no_more_than_some_wait_whoever_they_are_for(self, ends: tuple[End, End], number: int) -> None:
        a, b = ends
        meet(a, b)
        meet(a, a)
        a.wires.gather(lambda call: None)
        for i in range(number - 1):
            say(a, (a, b)[i % 2], b"%d" % i)
        say(a, b, b"last")
        assert b.wires.receive()[-1] == b"last"
        assert not any(wire.queued for wire in a.wires._outgoing.values())

    def test_who_looks_for_what_has_come_sends_first(self, ends: tuple[End, End]) -> None:
        a, b = ends
        meet(a, b)
        a.wires.gather(lambda call: None)
        say(a, b, b"one")
        assert a.wires.receive() == []
        assert b.wires.receive() == [b"one"]

    def test_the_end_of_it_and_of_all(self, ends: tuple[End, End]) -> None:
        a, b = ends
        meet(a, b)
        loop = Loop()
        a.wires.gather(loop.call_soon)
        say(a, b, b"one")
        a.wires.gather(None)
        say(a, b, b"two")
        assert b.wires.receive() == [b"one", b"two"]
        a.wires.gather(loop.call_soon)
        say(a, b, b"three")
        a.wires.close(TIMEOUT_S)
        loop.turn()
        assert received(b, 1, b) == [b"three"]

    def test_a_peer_that_is_forgotten_or_goes_meanwhile_harms_nobody(self, ends: tuple[End, End]) -> None:
        a, b = ends
        gone = End()
        for peer in (b, gone):
            meet(a, peer)
        loop = Loop()
        a.wires.gather(loop.call_soon)
        say(a, gone, b"lost")
        say(a, b, b"forgotten")
        gone.close()
        a.wires.forget(b.address)
        loop.turn()
        assert a.wires.receive() == b.wires.receive() == []
        assert GIVEN_BACK[gone.address] == [b"lost"]
        assert not a.wires.reaches(gone.address)
        meet(a, b)

    @given(FRAMES, st.sets(st.integers(0, 19)))
    def test_frames_arrive_whole_and_in_order(self, frames: list[bytes], turns: set[int]) -> None:
        a, b, loop = End(), End(), Loop()
        try:
            meet(a, b)
            a.wires.gather(loop.call_soon)
            for i, frame in enumerate(frames):
                say(a, b, frame)
                if i in turns:
                    loop.turn()
            assert received(b, len(frames), a) == frames
        finally:
            a.close()
            b.close()


@pytest.mark.parametrize("who", ["listener", "caller"])
def test_another_users_process_is_refused(ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    a, b = ends
    real, calls = os.geteuid(), iter([real_or_other(who == "caller"), real_or_other(who == "listener")])
    monkeypatch.setattr(host_wire.os, "geteuid", lambda: next(calls, real))
    assert a.wires.reaches(b.address) is (who == "listener")       # the caller asks first
    assert b.wires.receive() == []
    until(lambda: a.wires.receive() == [] and not a.wires.reaches(b.address))


def real_or_other(other: bool) -> int:
    return os.geteuid() + other


def test_those_that_prove_nothing_give_way_and_hold_up_nobody(ends: tuple[End, End], caplog: pytest.LogCaptureFixture) -> None:
    a, b = ends
    with ExitStack() as opened:
        strangers = [opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) for _ in range(200)]
        for each in strangers:
            each.connect(b.wires._name(b.address))
        before = len(b.wires._ends)
        assert b.wires.receive() == []
        assert len(b.wires._ends) - before <= MAX_ACCEPTED
        meet(a, b)
        assert len(b.wires._unproven) <= MAX_UNPROVEN
        assert len(caplog.records) <= 10, "a log that strangers can fill"
        until(lambda: hung_up_on(strangers[0], b))
    until(lambda: b.wires.receive() == [] and not b.wires._unproven)


def test_a_process_out_of_files_hears_its_peers_once_it_has_some(ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = ends
    say(a, b, b"hello")
    listener = b.wires._listener
    full = SimpleNamespace(accept=fail(OSError(errno.EMFILE, "Too many open files")), fileno=listener.fileno)
    b.wires._listener = full
    assert b.wires.receive() == []
    assert select.select([b.wires], [], [], 0)[0] == [], "its loop would spin"
    b.wires._listener = listener
    assert received(b, 1, a) == [b"hello"]
    monkeypatch.setattr(host_wire.socket, "socket", fail(OSError(errno.EMFILE, "Too many open files")))
    assert not a.wires.reaches(new_address())
    with pytest.raises(ClusterError, match="Too many open files"):
        End()


def fail(error: OSError) -> Callable[..., Any]:
    def raises(*_: object) -> None:
        raise error

    return raises


def test_last_words_arrive_and_are_waited_for_no_longer_than_told(ends: tuple[End, End]) -> None:
    a, b = ends
    meet(a, b)
    count = fill(a, b)
    heard: list[bytes] = []
    reader = threading.Thread(target=lambda: until(lambda: heard.extend(b.wires.receive()) or len(heard) == count))
    reader.start()
    a.wires.close(TIMEOUT_S)
    reader.join()
    leaver = End()
    meet(leaver, b)
    fill(leaver, b)
    started = time.monotonic()
    leaver.wires.close(0.05)                                       # nobody reads meanwhile
    assert 0.04 < time.monotonic() - started < TIMEOUT_S / 2


def fill(sender: End, receiver: End) -> int:
    """More than the kernel takes. → frames."""
    count = 0
    while len(sender.wires._outgoing[receiver.address].queued) < 3:
        say(sender, receiver, bytes(MAX_FRAME_BYTES))
        count += 1
    return count


def test_after_closing_nobody_is_reached(ends: tuple[End, End]) -> None:
    a, b = ends
    meet(a, b)
    a.close()
    assert not a.wires.reaches(b.address)
    assert not a.wires.reaches(new_address())


def test_whose_name_is_taken_goes_without(ends: tuple[End, End], caplog: pytest.LogCaptureFixture) -> None:
    a, b = ends
    second = wires_at(a.address)
    try:
        assert "Address already in use" in caplog.text
        assert second.reaches(b.address)
        second.send(b.address, b"hello")
        until(lambda: second.receive() == [] and b.wires.receive() == [b"hello"])
    finally:
        second.close(0.0)
    meet(b, a)


def test_close_leaves_no_file_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    a, b = End(), End()
    meet(a, b)
    say(b, a, b"unheard")
    a.close()
    b.close()
    assert len(os.listdir("/proc/self/fd")) == before
