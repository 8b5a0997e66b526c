"""The fake network does what its name says to exactly the messages that it is told to."""

import pytest

from diptych.messages.codec import MAX_FRAME_BYTES, Message
from diptych.messages.errors import TooLarge
from diptych.messages.fake_post import FakeNetwork, FakePost
from diptych.messages.ids import RequestId
from diptych.messages.requests import Abort


@pytest.fixture
def network() -> FakeNetwork:
    return FakeNetwork()


@pytest.fixture
def a(network: FakeNetwork) -> FakePost:
    return network.post("a")


@pytest.fixture
def b(network: FakeNetwork) -> FakePost:
    return network.post("b")


def letter(name: str) -> Abort:
    return Abort(RequestId(name))


def names(messages: list[Message]) -> list[str]:
    return [message.request_id for message in messages if isinstance(message, Abort)]


def test_a_message_waits_in_flight_until_it_is_delivered(network: FakeNetwork, a: FakePost, b: FakePost) -> None:
    a.send(b.address, letter("1"))
    assert b.receive(0) == []
    network.deliver()
    assert b.receive(0) == [letter("1")]
    assert b.receive(0) == []


def test_drop_double_and_reorder(network: FakeNetwork, a: FakePost, b: FakePost) -> None:
    for name in "1234":
        a.send(b.address, letter(name))
    assert network.drop(1).message == letter("2")
    network.double(0)
    network.deliver(2)
    network.deliver_all()
    assert names(b.receive(0)) == ["4", "1", "3", "1"]


def test_the_dead_receive_nothing_and_send_nothing(network: FakeNetwork, a: FakePost, b: FakePost) -> None:
    a.send(b.address, letter("unread"))
    network.deliver()
    a.send(b.address, letter("in flight"))
    b.send(a.address, letter("last words"))
    network.kill(b.address)
    b.send(a.address, letter("from the grave"))
    network.deliver_all()
    assert b.receive(0) == []
    assert names(a.receive(0)) == ["last words"]


def test_forget_drops_ones_own_messages_only(network: FakeNetwork, a: FakePost, b: FakePost) -> None:
    c = network.post("c")
    a.send(c.address, letter("a to c"))
    b.send(c.address, letter("b to c"))
    a.send(b.address, letter("a to b"))
    a.forget(c.address)
    network.deliver_all()
    assert names(c.receive(0)) == ["b to c"]
    assert names(b.receive(0)) == ["a to b"]


def test_what_the_wire_would_refuse_the_fake_refuses(network: FakeNetwork, a: FakePost, b: FakePost) -> None:
    with pytest.raises(TooLarge):
        a.send(b.address, letter("x" * MAX_FRAME_BYTES))
    assert network.in_flight == []


def test_close(network: FakeNetwork, a: FakePost, b: FakePost) -> None:
    b.close()
    a.send(b.address, letter("1"))
    network.deliver_all()
    assert b.receive(0) == []


def test_what_is_sent_to_a_member_that_has_left_goes_nowhere(network: FakeNetwork, a: FakePost, b: FakePost) -> None:
    a.update_members({b.address})
    a.send(b.address, letter("queued"))
    a.update_members(set())
    a.send(b.address, letter("late"))
    assert network.in_flight == []
    a.update_members({b.address})
    a.send(b.address, letter("another life"))
    network.deliver_all()
    assert names(b.receive(0)) == ["another life"]
