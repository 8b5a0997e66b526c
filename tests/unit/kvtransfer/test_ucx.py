"""The `ucx` transport between processes: what arrives, what a stop means, and what is left when either side is killed or stalls."""

import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import msgspec
import pytest
import torch
from harness.ucx import needs_ucx
from harness.ucx_peer import UcxPeer, byte_layout, pages_of, ucx_peer

from diptych.kvtransfer.transport import KVPool, Peer, connect_within
from diptych.kvtransfer.ucx.transport import UcxTransport
from diptych.messages.errors import ClusterError, LayoutMismatch, PeerGone, TransferError
from diptych.messages.ids import Imm

PAGE_BYTES = 4096
NUM_PAGES = 2048
EVERYTHING = range(NUM_PAGES)
LANES = {"shared memory": None, "tcp": "tcp,self"}


pytestmark = needs_ucx


class Writer:
    def __init__(self, stall_s: float = 5.0) -> None:
        self.transport = UcxTransport(stall_s=stall_s)
        self.pool: KVPool = self.transport.allocate(byte_layout(PAGE_BYTES), NUM_PAGES)
        self.fill(0)

    def fill(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        pages_of(self.pool.tensor)[:] = torch.randint(0, 256, (NUM_PAGES, PAGE_BYTES), dtype=torch.uint8, generator=generator)

    def page(self, index: int) -> bytes:
        return pages_of(self.pool.tensor)[index].numpy().tobytes()


@pytest.fixture
def writer() -> Iterator[Writer]:
    writer = Writer()
    yield writer
    writer.transport.close()


@pytest.fixture(scope="module")
def receiver() -> Iterator[UcxPeer]:
    """One for all tests that leave it unharmed."""
    with ucx_peer(PAGE_BYTES, NUM_PAGES) as peer:
        yield peer
    assert peer.process.exitcode == 0


def until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.001)


def page_of(pool: bytes, index: int) -> bytes:
    return pool[index * PAGE_BYTES : (index + 1) * PAGE_BYTES]


def write_until_refused(writer: Writer, peer: Peer, imm: Imm, timeout_s: float) -> PeerGone:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            writer.transport.write_pages(peer, EVERYTHING, EVERYTHING, imm)
        except PeerGone as error:
            return error
        time.sleep(0.002)
    raise AssertionError(f"still accepted after {timeout_s} s")


def assert_works(writer: Writer, peer: Peer, receiver: UcxPeer, seed: int) -> None:
    """A whole pool, permuted, arrives and is counted exactly."""
    imm = Imm(seed)
    writer.fill(seed)
    target = random.Random(seed).sample(EVERYTHING, NUM_PAGES)
    receiver.call("reset", imm)
    writer.transport.write_pages(peer, EVERYTHING, target, imm)
    receiver.call("landed_at", imm, NUM_PAGES, 20.0)
    pool = receiver.call("read")
    assert isinstance(pool, bytes)
    assert all(page_of(pool, target[i]) == writer.page(i) for i in EVERYTHING)
    assert writer.transport.stop(peer, imm, 5.0)
    assert receiver.call("num_landed", imm) == NUM_PAGES


def test_permuted_pages_arrive_and_are_counted(writer: Writer, receiver: UcxPeer) -> None:
    peer = connect_within(writer.transport, receiver.descriptor, 5.0)
    assert_works(writer, peer, receiver, seed=1)
    assert writer.transport.stats.num_bytes == NUM_PAGES * PAGE_BYTES
    assert writer.transport.stats.busy_s > 0


def test_neighbours_travel_together_and_land_apart(writer: Writer, receiver: UcxPeer) -> None:
    """Runs that are longer than one put, broken on one side only, and repeated sources."""
    peer = connect_within(writer.transport, receiver.descriptor, 5.0)
    source = [*range(100, 300), *range(10, 20), 5, 5, 5]
    target = [*range(1000, 1200), *range(500, 505), *range(600, 605), 7, 9, 8]
    receiver.call("reset", 9)
    writer.transport.write_pages(peer, source, target, Imm(9))
    receiver.call("landed_at", 9, len(source), 10.0)
    pool = receiver.call("read")
    assert isinstance(pool, bytes)
    assert all(page_of(pool, there) == writer.page(here) for here, there in zip(source, target, strict=True))


def test_many_tickets_at_once(writer: Writer, receiver: UcxPeer) -> None:
    peer = connect_within(writer.transport, receiver.descriptor, 5.0)
    order = random.Random(3).sample(EVERYTHING, NUM_PAGES)
    shares = [order[i::64] for i in range(64)]                      # 64 tickets of 32 pages in 8 writes each
    for imm in range(64):
        receiver.call("reset", imm)
    for part in range(8):
        for imm, share in enumerate(shares):
            pages = share[part::8]
            writer.transport.write_pages(peer, pages, pages, Imm(imm))
    for imm, share in enumerate(shares):
        receiver.call("landed_at", imm, len(share), 10.0)
    assert receiver.call("read") == pages_of(writer.pool.tensor).numpy().tobytes()
    assert all(writer.transport.stop(peer, Imm(imm), 5.0) for imm in range(64))
    assert [receiver.call("num_landed", imm) for imm in range(64)] == [len(share) for share in shares]


@pytest.mark.parametrize("lanes", LANES)
def test_after_a_stop_nothing_more_lands(lanes: str, receiver: UcxPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    if LANES[lanes] is not None:
        monkeypatch.setenv("UCX_TLS", LANES[lanes])
    writer = Writer()
    peer = connect_within(writer.transport, receiver.descriptor, 5.0)
    receiver.call("reset", 20)
    for _ in range(64):
        writer.transport.write_pages(peer, EVERYTHING, EVERYTHING, Imm(20))
    receiver.call("landed_at", 20, 1, 10.0)
    assert writer.transport.stop(peer, Imm(20), 10.0)
    counted, before = receiver.call("num_landed", 20), receiver.call("read")
    assert isinstance(counted, int)
    assert counted < 64 * NUM_PAGES
    writer.fill(21)                                                 # would show if anything still left
    time.sleep(0.3)
    assert receiver.call("num_landed", 20) == counted
    assert receiver.call("read") == before
    assert_works(writer, peer, receiver, seed=20)                   # the same counter again
    writer.transport.close()


@pytest.mark.parametrize("lanes", LANES)
def test_settled_pages_may_change_at_once(lanes: str, receiver: UcxPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    if LANES[lanes] is not None:
        monkeypatch.setenv("UCX_TLS", LANES[lanes])
    writer = Writer()
    peer = connect_within(writer.transport, receiver.descriptor, 5.0)
    receiver.call("reset", 21)
    writer.fill(5)
    sent = pages_of(writer.pool.tensor).numpy().tobytes()
    writer.transport.write_pages(peer, EVERYTHING, EVERYTHING, Imm(21))
    until(lambda: writer.transport.settled(peer, Imm(21)), 10.0)
    writer.fill(6)
    receiver.call("landed_at", 21, NUM_PAGES, 10.0)
    assert receiver.call("read") == sent
    writer.transport.close()


def test_stop_without_writes_is_true_at_once(writer: Writer, receiver: UcxPeer) -> None:
    peer = connect_within(writer.transport, receiver.descriptor, 5.0)
    assert writer.transport.stop(peer, Imm(30), 0.0)
    assert writer.transport.busy_s(peer, Imm(30)) == 0.0


@pytest.mark.parametrize("lanes", LANES)
def test_a_killed_receiver_is_reported_and_survived(lanes: str, monkeypatch: pytest.MonkeyPatch, receiver: UcxPeer) -> None:
    if LANES[lanes] is not None:
        monkeypatch.setenv("UCX_TLS", LANES[lanes])
    writer = Writer()
    with ucx_peer(PAGE_BYTES, NUM_PAGES) as victim:
        peer = connect_within(writer.transport, victim.descriptor, 5.0)
        writer.transport.write_pages(peer, EVERYTHING, EVERYTHING, Imm(1))
        victim.signal(signal.SIGKILL)
        write_until_refused(writer, peer, Imm(1), 3.0)
        assert not writer.transport.stop(peer, Imm(1), 0.0)          # for all that we know it might still land
        with pytest.raises(PeerGone, match=r"earlier pages were lost|link is down"):
            writer.transport.write_pages(peer, [0], [0], Imm(1))
        other = connect_within(writer.transport, receiver.descriptor, 5.0)        # while the dead one is still being dialled
        assert_works(writer, other, receiver, seed=40)
        writer.transport.disconnect(peer)                            # the controller has confirmed its death
        assert writer.transport.stop(peer, Imm(1), 0.0)
    assert_works(writer, other, receiver, seed=41)
    writer.transport.close()


def test_a_killed_writer_harms_nobody(writer: Writer, receiver: UcxPeer) -> None:
    with ucx_peer(PAGE_BYTES, NUM_PAGES) as victim:
        receiver.call("reset", 50)
        victim.tell("write_for_ever", receiver.descriptor, 50)
        receiver.call("landed_at", 50, NUM_PAGES, 20.0)
        victim.signal(signal.SIGKILL)
        victim.process.join(10.0)
        assert receiver.call("fence", victim.descriptor) is True
        counted, before = receiver.call("num_landed", 50), receiver.call("read")
        time.sleep(0.2)
        assert (receiver.call("num_landed", 50), receiver.call("read")) == (counted, before)
    peer = connect_within(writer.transport, receiver.descriptor, 5.0)
    assert_works(writer, peer, receiver, seed=51)


def test_a_fence_stands_also_for_a_writer_that_lives_on(receiver: UcxPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was given up behind a cut cable, and dials again. A later life has another name. (Of a writer on its own host a receiver hears
    that it has died only when its process is gone: in shared memory nobody could keep it from storing.)"""
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    zombie = Writer(stall_s=1.0)
    peer = connect_within(zombie.transport, receiver.descriptor, 5.0)
    assert_works(zombie, peer, receiver, seed=55)
    assert receiver.call("fence", zombie.transport.register(zombie.pool)) is True
    receiver.call("reset", 56)
    before, give_up_at = receiver.call("read"), time.monotonic() + 1.0
    zombie.fill(56)
    while time.monotonic() < give_up_at:
        with suppress(PeerGone):
            zombie.transport.write_pages(peer, range(NUM_PAGES), range(NUM_PAGES), Imm(56))
        time.sleep(0.02)
    assert (receiver.call("num_landed", 56), receiver.call("read")) == (0, before)
    zombie.transport.close()
    again = Writer()
    assert_works(again, connect_within(again.transport, receiver.descriptor, 5.0), receiver, seed=57)
    again.transport.close()


def test_a_dead_writer_that_cannot_be_named_is_fenced_with_everybody(receiver: UcxPeer) -> None:
    """Its descriptor is not ours, or of another version. Those that live lose what they had under way, and dial again."""
    living = Writer(stall_s=1.0)
    peer = connect_within(living.transport, receiver.descriptor, 5.0)
    with ucx_peer(PAGE_BYTES, NUM_PAGES) as victim:
        receiver.call("reset", 52)
        victim.tell("write_for_ever", receiver.descriptor, 52)
        receiver.call("landed_at", 52, NUM_PAGES, 20.0)
        victim.signal(signal.SIGKILL)
        victim.process.join(10.0)
        assert receiver.call("fence", msgspec.structs.replace(victim.descriptor, location=b"no location")) is True
        counted, before = receiver.call("num_landed", 52), receiver.call("read")
        time.sleep(0.2)
        assert (receiver.call("num_landed", 52), receiver.call("read")) == (counted, before)
    write_until_refused(living, peer, Imm(53), 10.0)
    until(lambda: living.transport.stop(peer, Imm(53), 0.0), 10.0)
    assert_works(living, connect_within(living.transport, receiver.descriptor, 5.0), receiver, seed=54)
    living.transport.close()


def test_a_link_that_ucx_does_not_let_go_of_is_an_error(writer: Writer, receiver: UcxPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than a loop that waits for ever. With no time UCX is too late, unless this thread has to wait for its core just then."""
    monkeypatch.setattr("diptych.kvtransfer.ucx.transport.LEAVE_LIMIT_S", 0.0)

    def is_too_late() -> bool:
        peer = connect_within(writer.transport, receiver.descriptor, 5.0)
        try:
            writer.transport.disconnect(peer)
        except TransferError as error:
            return "has not let go of a link within 0 s" in str(error)
        return False

    until(is_too_late, 10.0)
    assert_works(writer, connect_within(writer.transport, receiver.descriptor, 5.0), receiver, seed=42)


@pytest.mark.parametrize("lanes", LANES)
def test_a_stalled_receiver_is_cut_off_and_fenced(lanes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP shows in no error; after SIGCONT what was on its way must be dead before `stop` says so."""
    if LANES[lanes] is not None:
        monkeypatch.setenv("UCX_TLS", LANES[lanes])
    writer = Writer(stall_s=1.0)
    with ucx_peer(PAGE_BYTES, NUM_PAGES) as stalled:
        peer = connect_within(writer.transport, stalled.descriptor, 5.0)
        stalled.signal(signal.SIGSTOP)
        write_until_refused(writer, peer, Imm(1), 10.0)
        assert not writer.transport.stop(peer, Imm(1), 0.2)
        stalled.signal(signal.SIGCONT)
        until(lambda: writer.transport.stop(peer, Imm(1), 0.0), 10.0)
        counted, before = stalled.call("num_landed", 1), stalled.call("read")
        writer.fill(60)
        time.sleep(0.5)
        assert (stalled.call("num_landed", 1), stalled.call("read")) == (counted, before)
        assert_works(writer, connect_within(writer.transport, stalled.descriptor, 5.0), stalled, seed=61)
    writer.transport.close()


def come_and_go(receiver: UcxPeer) -> None:
    guest = Writer()
    for _ in range(2):
        peer = connect_within(guest.transport, receiver.descriptor, 5.0)
        guest.transport.write_pages(peer, EVERYTHING, EVERYTHING, Imm(80))
        guest.transport.disconnect(peer)
    guest.transport.close()


@pytest.mark.parametrize("lanes", LANES)
def test_links_leave_nothing_behind(lanes: str, writer: Writer, receiver: UcxPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    if LANES[lanes] is not None:
        monkeypatch.setenv("UCX_TLS", LANES[lanes])
    come_and_go(receiver)
    held = receiver.call("num_held")
    for _ in range(3):
        come_and_go(receiver)
    until(lambda: receiver.call("num_held") <= held, 5.0)        # fewer, if an earlier test's were still there
    assert_works(writer, connect_within(writer.transport, receiver.descriptor, 5.0), receiver, seed=81)


def test_a_dead_receiver_cannot_be_connected_to(writer: Writer, receiver: UcxPeer) -> None:
    with ucx_peer(PAGE_BYTES, 8) as victim:
        victim.signal(signal.SIGKILL)
        victim.process.join(10.0)
        with pytest.raises(PeerGone, match=r"no link to .* over ucx within 2.0 s"):
            connect_within(writer.transport, victim.descriptor, 2.0)
    assert_works(writer, connect_within(writer.transport, receiver.descriptor, 5.0), receiver, seed=70)


def test_what_does_not_fit_is_refused(writer: Writer, receiver: UcxPeer) -> None:
    descriptor = receiver.descriptor
    with pytest.raises(LayoutMismatch, match="pages of 8192 bytes there, 4096 here"):
        writer.transport.connect(msgspec.structs.replace(descriptor, page_bytes=8192))
    with pytest.raises(TransferError, match="not ours"):
        writer.transport.connect(msgspec.structs.replace(descriptor, location=b"\x00"))
    peer = connect_within(writer.transport, descriptor, 5.0)
    for source, target, imm in (([0], [NUM_PAGES], 0), ([-1], [0], 0), ([NUM_PAGES], [0], 0), ([0, 1], [0], 0), ([0], [0], 4096)):
        with pytest.raises(TransferError):
            writer.transport.write_pages(peer, source, target, Imm(imm))
    assert writer.transport.stop(peer, Imm(0), 0.0)


def test_the_pool_outlives_its_transport() -> None:
    writer = Writer()
    expected = writer.page(5)
    writer.transport.close()
    writer.transport.close()
    assert writer.page(5) == expected


def test_more_memory_than_there_is_is_refused() -> None:
    transport = UcxTransport()
    with pytest.raises(ClusterError, match=f"{2**50} bytes of host memory wanted"):
        transport.allocate(byte_layout(2**30), 2**20)
    transport.close()
