"""Which of several transports a pair of workers uses."""

import pytest

from diptych.engine.fake_runner import fake_layout
from diptych.kvtransfer.bundle import TransportBundle
from diptych.kvtransfer.fake import FakeFabric, FakeTransport
from diptych.kvtransfer.link_choice import DIAL_S
from diptych.kvtransfer.transport import Peer
from diptych.messages.errors import PeerGone
from diptych.messages.membership import MemoryDescriptor


class Dialling(FakeTransport):
    """Reaches nobody until told so."""

    reaches = False

    def connect(self, descriptor: MemoryDescriptor) -> Peer | None:
        return super().connect(descriptor) if self.reaches else None


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def pair(*names: str) -> tuple[TransportBundle, dict[str, Dialling], tuple[MemoryDescriptor, ...], Clock]:
    """A writer whose transports dial, the same by name, and the descriptors of a receiver that has all of them."""
    fabrics, clock = {name: FakeFabric() for name in names}, Clock()
    here = {name: Dialling(fabrics[name], b"writer", name) for name in names}
    writer = TransportBundle(list(here.values()), clock=clock)
    receiver = TransportBundle([FakeTransport(fabrics[name], b"receiver", name) for name in names])
    for bundle in (writer, receiver):
        bundle.register(bundle.allocate(fake_layout(), 2))
    return writer, here, receiver.descriptors, clock


def used(peer: Peer | None) -> str | None:
    return peer and peer.descriptor.transport


def test_the_first_that_reaches_is_used() -> None:
    writer, here, target, _ = pair("first", "second")
    here["first"].reaches = here["second"].reaches = True
    assert used(writer.connect(target)) == "first"


def test_one_that_is_dialled_for_too_long_is_passed_over_until_it_reaches() -> None:
    writer, here, target, clock = pair("first", "second")
    here["second"].reaches = True
    assert writer.connect(target) is None
    clock.now += 0.9 * DIAL_S
    assert writer.connect(target) is None
    clock.now += 0.2 * DIAL_S
    assert used(writer.connect(target)) == "second"
    here["first"].reaches = True
    assert used(writer.connect(target)) == "first"


def test_the_only_one_is_dialled_for_as_long_as_it_takes() -> None:
    writer, here, target, clock = pair("only")
    for _ in range(3):
        assert writer.connect(target) is None
        clock.now += 2 * DIAL_S
    here["only"].reaches = True
    assert used(writer.connect(target)) == "only"


def test_a_new_acquaintance_is_given_its_time_again() -> None:
    writer, here, target, clock = pair("first", "second")
    here["second"].reaches = True
    assert writer.connect(target) is None
    clock.now += 2 * DIAL_S
    writer.disconnect(target)
    assert writer.connect(target) is None


def test_who_is_reached_by_none_is_gone() -> None:
    writer, here, target, _ = pair("first", "second")
    for transport in here.values():
        transport.reaches = True
        transport.fabric.kill(b"receiver")
    with pytest.raises(PeerGone, match=r"first: .*; second: "):
        writer.connect(target)
