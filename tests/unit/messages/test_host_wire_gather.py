"""Frames that wait for one another within a turn of a loop: together, in order, and none lost."""

from collections.abc import Callable

import pytest
from harness.host_wires import GIVEN_BACK, MAX_FRAME_BYTES, TIMEOUT_S, End, meet, received, say
from hypothesis import given
from hypothesis import strategies as st

from diptych.messages.host_wire import (
    MAX_TOGETHER,
)

FRAMES = st.lists(st.one_of(st.binary(max_size=50), st.integers(0, MAX_FRAME_BYTES).map(bytes)), max_size=20)


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

    def test_last_words_to_one_that_is_forgotten_leave_first(self, ends: tuple[End, End]) -> None:
        a, b = ends
        meet(a, b)
        a.wires.gather(lambda call: None)
        say(a, b, b"abort")
        a.wires.forget(b.address)
        assert b.wires.receive() == [b"abort"]

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
        assert a.wires.receive() == []
        assert b.wires.receive() == [b"forgotten"]
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
