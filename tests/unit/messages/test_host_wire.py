"""Wires between members of one host: frames whole and in order, and nothing that blocks or is left behind."""

import errno
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from harness.host_wires import (
    MAX_FRAME_BYTES,
    MAX_QUEUED,
    PUBLIC,
    SECRET,
    TIMEOUT_S,
    End,
    fill,
    meet,
    new_address,
    received,
    say,
    until,
    wires_at,
)
from hypothesis import given
from hypothesis import strategies as st

from diptych.messages import host_wire
from diptych.messages.errors import ClusterError
from diptych.messages.host_wire import (
    CHUNK_BYTES,
    MAX_CHUNKS,
    _Incoming,
)

FRAMES = st.lists(st.one_of(st.binary(max_size=50), st.integers(0, MAX_FRAME_BYTES).map(bytes)), max_size=20)


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
