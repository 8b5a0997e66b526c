"""Which transports a worker gets, and which of them a pair uses."""

import logging
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diptych.kvtransfer.bundle import TransportBundle
from diptych.kvtransfer.fake import FakeFabric, FakeTransport
from diptych.kvtransfer.layout import KVLayout
from diptych.kvtransfer.selection import AS_FAST, Owner, fastest_first, make_sharded, make_transports, what_is_wrong
from diptych.kvtransfer.transport import Peer
from diptych.messages.errors import ClusterError, PeerGone, TransferError
from diptych.messages.ids import Epoch, Imm, WorkerId
from diptych.messages.membership import MemoryDescriptor
from diptych.messages.requests import LinkFigures

LAYOUT = KVLayout("test", torch.int64, num_layers=1, num_kv_heads=1, head_dim=1, block_size=4)


@dataclass
class Picky(FakeTransport):
    """Reaches nobody, or only after it has been asked often enough."""

    patience: int = 0
    gone: bool = False
    disconnected: list[bytes] = field(default_factory=list)

    def connect(self, descriptor: MemoryDescriptor) -> Peer | None:
        if self.gone:
            raise PeerGone("another host")
        self.patience -= 1
        return super().connect(descriptor) if self.patience < 0 else None

    def disconnect(self, peer: Peer) -> None:
        self.disconnected.append(peer.descriptor.location)


def bundle(fabric: FakeFabric, place: str, *names: str) -> TransportBundle:
    """Each transport has a fabric address of its own, and all one pool."""
    made = TransportBundle([Picky(fabric, f"{place}-{name}".encode(), name) for name in names])
    made.register(made.allocate(LAYOUT, 8))
    return made


@pytest.mark.parametrize(
    ("names", "device", "problem"),
    [
        ((), "cpu", "must name at least one"),
        (("pigeon",), "cpu", "'pigeon' is not there yet; known: shm, nvlink, ucx"),
        (("ucx", "ucx"), "cpu", "'ucx' is named twice"),
        (("shm",), "cuda:0", "'shm' does not move memory of cuda"),
    ],
)
def test_what_cannot_be_made_is_said(names: tuple[str, ...], device: str, problem: str) -> None:
    assert problem in "; ".join(what_is_wrong(names, device))
    with pytest.raises(ClusterError, match="transports "):
        make_transports(names, Owner("c", WorkerId("w"), Epoch(1), device))


@pytest.mark.parametrize(
    ("device", "names"), [("cpu", ("shm",)), ("cpu", ("ucx",)), ("cpu", ("ucx", "shm")), ("cuda:0", ("nvlink", "ucx")), ("cuda", ("ucx",))]
)
def test_what_can_be_made(device: str, names: tuple[str, ...]) -> None:
    assert what_is_wrong(names, device) == []


def test_the_first_that_both_have_is_used() -> None:
    fabric = FakeFabric()
    here, there = bundle(fabric, "here", "a", "b", "c"), bundle(fabric, "there", "c", "b")
    peer = here.connect(there.descriptors)
    assert peer is not None
    assert peer.descriptor.transport == "b"
    here.write_pages(peer, [1], [2], Imm(3))
    fabric.land_all()
    assert there.num_landed(Imm(3)) == 1
    there.reset(Imm(3))
    assert there.num_landed(Imm(3)) == 0


def test_a_fall_back_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    fabric = FakeFabric()
    here, there = bundle(fabric, "here", "a", "b"), bundle(fabric, "there", "a", "b")
    here._transports["a"].gone = True
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            peer = here.connect(there.descriptors)
            assert peer is not None
            assert peer.descriptor.transport == "b"
    assert [record.getMessage() for record in caplog.records] == ["KV to fake goes over b, since a: another host"]
    here._transports["b"].gone = True
    with pytest.raises(PeerGone, match="a: another host; b: another host"):
        here.connect(there.descriptors)


def test_the_preferred_one_is_waited_for_and_left_again() -> None:
    fabric = FakeFabric()
    here, there = bundle(fabric, "here", "a", "b"), bundle(fabric, "there", "a", "b")
    here._transports["a"].patience = 1
    assert here.connect(there.descriptors) is None
    peer = here.connect(there.descriptors)
    assert peer is not None
    assert peer.descriptor.transport == "a"
    here.disconnect(there.descriptors)
    assert here._transports["a"].disconnected == [b"there-a"]
    assert here._transports["b"].disconnected == [b"there-b"]


def test_nothing_in_common_is_said() -> None:
    fabric = FakeFabric()
    with pytest.raises(TransferError, match="no transport in common: a here, b there"):
        bundle(fabric, "here", "a").connect(bundle(fabric, "there", "b").descriptors)


def test_a_fence_is_over_all_transports() -> None:
    fabric = FakeFabric()
    here, there = bundle(fabric, "here", "a", "b"), bundle(fabric, "there", "a", "b")
    writer = (*there.descriptors, msgspec.structs.replace(there.descriptors[0], transport="unknown"))
    assert here.fence(writer, 0.0)
    here._transports["b"].fences = False
    assert not here.fence(writer, 0.0)


def order_of(**gbps: float) -> list[str]:
    return [each.transport for each in fastest_first([LinkFigures(name, 1e-5, speed) for name, speed in gbps.items()])]


def test_the_fastest_comes_first_and_the_specs_order_decides_between_equals() -> None:
    assert order_of(a=10.0, b=12.0) == ["b", "a"]
    assert order_of(a=11.0, b=12.0) == ["a", "b"]
    assert order_of(a=1.0, b=11.0, c=12.0, d=13.0) == ["c", "d", "b", "a"]
    assert order_of(a=3.0) == ["a"]


@given(st.lists(st.floats(0.01, 1000.0), max_size=6))
def test_nothing_is_lost_and_what_comes_first_is_about_as_fast_as_any(speeds: list[float]) -> None:
    measured = [LinkFigures(str(i), 1e-5, gbps) for i, gbps in enumerate(speeds)]
    order = fastest_first(measured)
    assert sorted(order, key=measured.index) == measured
    for i, each in enumerate(order):
        assert all(each.gbps >= AS_FAST * later.gbps for later in order[i:])
        passed = [later for later in order[i:] if measured.index(later) < measured.index(each)]
        assert all(later.gbps < AS_FAST * max(other.gbps for other in order[i:]) for later in passed), "it was named before, and is as fast"


def test_what_was_measured_is_preferred_until_the_peer_has_gone() -> None:
    fabric = FakeFabric()
    here, there = bundle(fabric, "here", "a", "b"), bundle(fabric, "there", "a", "b")

    def used() -> str | None:
        peer = here.connect(there.descriptors)
        return peer and peer.descriptor.transport

    assert used() == "a"
    here.prefer(there.descriptors, ["b"])
    assert (used(), here.common(there.descriptors)) == ("b", ["b", "a"])
    here._transports["b"].gone = True
    assert used() == "a", "a fall-back goes on in the spec's order"
    here.disconnect(there.descriptors)
    here._transports["b"].gone = False
    assert used() == "a"


def test_links_are_counted_when_they_are_found_anew_or_change() -> None:
    fabric = FakeFabric()
    here, there = bundle(fabric, "here", "a", "b"), bundle(fabric, "there", "a", "b")
    counts = []
    for gone in (("b",), ("b",), (), ("a",), ("a",), ("a", "b"), ("a",), ()):
        for name in "ab":
            here._transports[name].gone = name in gone
        with suppress(PeerGone):
            here.connect(there.descriptors)
        counts.append(here.num_links(there.descriptors))
    assert counts == [1, 1, 1, 2, 2, 2, 3, 4]


def test_each_rank_has_shared_memory_of_its_own() -> None:
    """Also beside the worker's staging pool, whose ranks have some, too."""
    names = set()
    for worker in ("prefill-0", "prefill-0.staging"):
        owner = Owner("test-ranks", WorkerId(worker), Epoch(7), "cpu")
        sharded = make_sharded(["shm"], owner, ["cpu"] * 3)
        layout = KVLayout("test", torch.int64, 1, num_kv_heads=3, head_dim=1, block_size=4, tp_size=3, piece_heads=1)
        try:
            names |= {each.location.decode() for each in sharded.register(sharded.allocate(layout, 2))}
        finally:
            sharded.close()
    suffixes = ["", ".1", ".2", ".staging", ".staging.1", ".staging.2"]
    assert names == {f"diptych-test-ranks-prefill-0{suffix}-7" for suffix in suffixes}
    assert owner.of_rank(2, "cuda:2") == Owner("test-ranks", WorkerId("prefill-0.staging.2"), Epoch(7), "cuda:2")
