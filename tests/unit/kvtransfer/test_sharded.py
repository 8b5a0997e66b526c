"""A worker's ranks as one: links, counters, ends and figures, over transports whose every write the test lands."""

from dataclasses import replace
from itertools import permutations

import pytest
from harness.shards import HEADS, TP_PAIRS, Side, fill, layout_of, whole, write
from msgspec.structs import replace as change

from diptych.kvtransfer.bundle import TransportBundle
from diptych.kvtransfer.fake import FakeFabric, FakeTransport
from diptych.kvtransfer.sharded import ShardedBundle
from diptych.kvtransfer.transport import NUM_IMMS, Peer
from diptych.messages.errors import LayoutMismatch, PeerGone, TransferError
from diptych.messages.ids import Imm
from diptych.messages.membership import MemoryDescriptor

BLOCKS, TRANSPORTS = 6, ("first", "second")
PAGES = {0: 5, 7: 1, 3: 17}


def side(fabric: FakeFabric, name: str, tp_size: int, names: tuple[str, ...] = TRANSPORTS) -> Side:
    ranks = [TransportBundle([FakeTransport(fabric, f"{name}.{rank}.{each}".encode(), each) for each in names]) for rank in range(tp_size)]
    return Side.of(ShardedBundle(ranks), BLOCKS)


def pair(tps: tuple[int, int]) -> tuple[FakeFabric, Side, Side]:
    fabric = FakeFabric()
    return fabric, side(fabric, "writer", tps[0]), side(fabric, "receiver", tps[1])


def connected(writer: Side, receiver: Side) -> Peer:
    peer = writer.bundle.connect(receiver.bundle.descriptors)
    assert peer is not None
    return peer


def used(peer: Peer | None) -> str | None:
    return peer and peer.descriptor.transport


def links(fabric: FakeFabric, writer: Side, receiver: Side, name: str) -> list[tuple[bytes, bytes]]:
    suffix = f".{name}".encode()
    pools = [location for location in fabric.pools if location.endswith(suffix)]
    return [(a, b) for a, b in permutations(pools, 2) if a.startswith(b"writer") and b.startswith(b"receiver")]


@pytest.mark.parametrize("tps", TP_PAIRS)
def test_pages_arrive_whole_and_are_counted(tps: tuple[int, int]) -> None:
    fabric, writer, receiver = pair(tps)
    numbers, before = fill(writer.memory), fill(receiver.memory, first=10**6)
    peer = connected(writer, receiver)
    for imm in (0, receiver.bundle.num_imms - 1):
        write(writer, peer, PAGES, imm)
        assert not writer.bundle.settled(peer, Imm(imm))
        counts = [receiver.bundle.num_landed(Imm(imm))]
        while fabric.in_flight:
            fabric.land(len(fabric.in_flight) // 2)
            counts.append(receiver.bundle.num_landed(Imm(imm)))
        assert counts == sorted(set(counts)), "a write was not counted"
        assert counts[-1] == receiver.wanted(len(PAGES))
        assert writer.bundle.settled(peer, Imm(imm))
    expected = before.clone()
    expected[list(PAGES.values())] = numbers[list(PAGES)]
    assert (whole(receiver.memory) == expected).all()
    receiver.bundle.reset(Imm(0))
    assert receiver.bundle.num_landed(Imm(0)) == 0
    assert receiver.bundle.num_landed(Imm(receiver.bundle.num_imms - 1)) == receiver.wanted(len(PAGES)), "another's counter"


@pytest.mark.parametrize("tps", TP_PAIRS)
def test_no_counter_has_two_writers(tps: tuple[int, int]) -> None:
    """They count by a load and a store: one of two would be lost."""
    fabric, writer, receiver = pair(tps)
    peer = connected(writer, receiver)
    for imm in range(3):
        write(writer, peer, PAGES, imm)
    counters = [(each.target, each.imm) for each in fabric.in_flight]
    assert len(set(counters)) == len(counters)
    assert all(0 <= imm < NUM_IMMS for _, imm in counters)


@pytest.mark.parametrize("tps", TP_PAIRS)
def test_a_lost_piece_is_missed(tps: tuple[int, int]) -> None:
    fabric, writer, receiver = pair(tps)
    peer = connected(writer, receiver)
    write(writer, peer, PAGES, 1)
    for lost in range(len(fabric.in_flight)):
        receiver.bundle.reset(Imm(1))
        sent = list(fabric.in_flight)
        fabric.in_flight.pop(lost)
        fabric.land_all()
        assert receiver.bundle.num_landed(Imm(1)) < receiver.wanted(len(PAGES))
        fabric.in_flight = sent


@pytest.mark.parametrize("tps", TP_PAIRS)
def test_it_has_stopped_once_every_route_has(tps: tuple[int, int]) -> None:
    fabric, writer, receiver = pair(tps)
    peer = connected(writer, receiver)
    write(writer, peer, PAGES, 2)
    assert writer.bundle.stop(peer, Imm(3), 0.0), "another handoff"
    while fabric.in_flight:
        assert not writer.bundle.stop(peer, Imm(2), 0.0)
        assert not writer.bundle.stop(peer, Imm(2), 0.001)
        fabric.land(-1)
    assert writer.bundle.stop(peer, Imm(2), 0.0)


@pytest.mark.parametrize("tps", TP_PAIRS)
def test_a_fence_stands_against_every_rank(tps: tuple[int, int]) -> None:
    fabric, writer, receiver = pair(tps)
    write(writer, connected(writer, receiver), PAGES, 2)
    last = receiver.bundle._ranks[-1]._transports["first"]
    assert isinstance(last, FakeTransport)
    last.fences = False
    assert not receiver.bundle.fence(writer.bundle.descriptors, 0.0)
    assert fabric.in_flight
    last.fences = True
    assert receiver.bundle.fence(writer.bundle.descriptors, 0.0)
    assert not fabric.in_flight


@pytest.mark.parametrize("tps", TP_PAIRS)
def test_disconnecting_leaves_no_route(tps: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    _, writer, receiver = pair(tps)
    left: list[tuple[bytes, bytes]] = []
    monkeypatch.setattr(FakeTransport, "disconnect", lambda here, peer: left.append((here.location, peer.descriptor.location)))
    connected(writer, receiver)
    writer.bundle.disconnect(receiver.bundle.descriptors)
    assert len(left) == len(set(left)) == tps[0] * tps[1] * len(TRANSPORTS)
    assert writer.bundle.num_links(receiver.bundle.descriptors) == 0


@pytest.mark.parametrize("tps", TP_PAIRS)
def test_all_routes_take_one_transport(tps: tuple[int, int]) -> None:
    """One link that is down, of whichever ranks, takes them all to the other; one that is dialled is waited for."""
    fabric, writer, receiver = pair(tps)
    target = receiver.bundle.descriptors
    assert used(writer.bundle.connect(target)) == "first"
    for victim in [each.location for each in target if each.transport == "first"]:
        pool = fabric.pools.pop(victim)
        peer = writer.bundle.connect(target)
        assert used(peer) == "second"
        write(writer, peer, PAGES, 0)
        assert {each.target.rpartition(b".")[2] for each in fabric.in_flight} == {b"second"}
        fabric.pools[victim] = pool
        fabric.in_flight.clear()
        assert used(writer.bundle.connect(target)) == "first"
    assert writer.bundle.num_links(target) == 1 + 2 * tps[1]
    for link in links(fabric, writer, receiver, "first"):
        fabric.cut.add(link)
        peer = writer.bundle.connect(target)
        assert used(peer) in (None, "first")
        fabric.cut.clear()
    fabric.cut.update(links(fabric, writer, receiver, "first"))
    assert writer.bundle.connect(target) is None
    fabric.cut.clear()
    writer.bundle.prefer(target, ["second"])
    assert used(writer.bundle.connect(target)) == "second"
    assert writer.bundle.common(target) == ["second", "first"]


def test_who_is_reached_over_no_transport_by_all_ranks_is_gone() -> None:
    fabric, writer, receiver = pair((2, 2))
    fabric.kill(b"receiver.0.first")
    fabric.kill(b"receiver.1.second")
    with pytest.raises(PeerGone, match=r"first: receiver.0.first is gone; second: receiver.1.second is gone"):
        writer.bundle.connect(receiver.bundle.descriptors)


def test_nothing_in_common() -> None:
    fabric = FakeFabric()
    writer, receiver = side(fabric, "writer", 2, ("first",)), side(fabric, "receiver", 1, ("second",))
    with pytest.raises(TransferError, match="no transport in common: first here, second there"):
        writer.bundle.connect(receiver.bundle.descriptors)


def test_a_target_that_does_not_fit_is_refused() -> None:
    _, writer, receiver = pair((2, 4))
    told = receiver.bundle.descriptors
    shrunk = tuple(change(each, num_pages=each.num_pages - (each.rank == 3)) for each in told)
    halved = tuple(change(each, page_bytes=each.page_bytes // 2) for each in told)
    counters = tuple(change(each, num_imms=NUM_IMMS + 1) for each in told)
    without = [tuple(each for each in told if each.rank != rank) for rank in range(4)]
    half_equipped = tuple(each for each in told if each.rank < 2 or each.transport == "second")
    for target in (shrunk, halved, counters, *without, half_equipped, (*told, told[0])):
        with pytest.raises(LayoutMismatch):
            writer.bundle.connect(target)


def test_whole_pages_and_pieces_do_not_mix() -> None:
    fabric = FakeFabric()
    sharded = side(fabric, "writer", 1, ("first",))
    plain = TransportBundle([FakeTransport(fabric, b"plain", "first")])
    plain.register(plain.allocate(replace(layout_of(1), piece_heads=0), BLOCKS))
    for here, there in ((sharded.bundle, plain), (plain, sharded.bundle)):
        with pytest.raises(LayoutMismatch, match="pages of"):
            here.connect(there.descriptors)


@pytest.mark.parametrize("tps", TP_PAIRS)
def test_a_counter_that_is_not_lent(tps: tuple[int, int]) -> None:
    _, writer, receiver = pair(tps)
    assert receiver.bundle.num_imms == NUM_IMMS * tps[1] // HEADS
    assert {each.num_imms for each in receiver.bundle.descriptors} == {receiver.bundle.num_imms}
    assert connected(writer, receiver).descriptor.num_imms == receiver.bundle.num_imms


@pytest.mark.parametrize("tps", TP_PAIRS)
def test_figures_are_of_all_ranks(tps: tuple[int, int]) -> None:
    """Ranks write side by side; a rank's own writes in turn, or not."""
    _, writer, receiver = pair(tps)
    peer = connected(writer, receiver)
    transports = [rank._transports["first"] for rank in writer.bundle._ranks]
    for transport in transports:
        assert isinstance(transport, FakeTransport)
        transport.page_s = 1.0
        transport.stats = transport.stats.plus(2 * HEADS // tps[0] * 5, 1000, 3.0 + transports.index(transport))
    write(writer, peer, PAGES, 4)
    of_rank = receiver.wanted(len(PAGES)) // tps[0]
    assert writer.bundle.busy_s(peer, Imm(4)) == of_rank
    for transport in transports:
        transport.overlaps = True
    assert writer.bundle.busy_s(peer, Imm(4)) == of_rank / max(1, tps[1] // tps[0])
    stats = writer.bundle.stats
    assert (stats.num_pages, stats.num_bytes, stats.busy_s) == (5, 1000 * tps[0], 3.0 + tps[0] - 1)


def test_pages_that_are_not_there_are_refused_before_any_is_written() -> None:
    fabric, writer, receiver = pair((2, 1))
    peer = connected(writer, receiver)
    for page in (BLOCKS * 3, -1):
        with pytest.raises(TransferError):
            write(writer, peer, {0: page}, 0)
    assert not fabric.in_flight


def test_descriptors_name_their_rank() -> None:
    _, _, receiver = pair((1, 4))
    told: list[MemoryDescriptor] = list(receiver.bundle.descriptors)
    assert [(each.rank, each.transport) for each in told] == [(rank, name) for rank in range(4) for name in TRANSPORTS]
