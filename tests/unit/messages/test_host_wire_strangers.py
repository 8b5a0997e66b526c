"""Who is no member of the cluster, on wires between members of one host: hung up on, told nothing, and in nobody's way."""

import os
import socket
from contextlib import ExitStack, suppress

import pytest
from harness.host_wires import GIVEN_BACK, MAX_FRAME_BYTES, PUBLIC, SECRET, End, meet, new_address, say, until, wires_at

from diptych.messages import host_wire
from diptych.messages.host_wire import (
    MAX_ACCEPTED,
    MAX_UNPROVEN,
    NONCE_BYTES,
    PROOF_BYTES,
    SIZE,
)


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
