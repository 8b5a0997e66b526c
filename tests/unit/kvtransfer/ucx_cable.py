"""Two hosts: network namespaces with a veth cable between them, cut and joined in mid-transfer. `test_ucx_cable.py` runs this."""

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from harness.cable import Cable, enter_network
from harness.ucx import needs_ucx
from harness.ucx_peer import UcxPeer, byte_layout, pages_of, ucx_peer

from diptych.kvtransfer.transport import KVPool, Peer, connect_within
from diptych.kvtransfer.ucx.transport import UcxTransport
from diptych.messages.errors import PeerGone
from diptych.messages.ids import Imm

PAGE_BYTES, NUM_PAGES = 4096, 2048
EVERYTHING = range(NUM_PAGES)

pytestmark = needs_ucx


@pytest.fixture
def cable() -> Iterator[Cable]:
    cable = Cable()
    try:
        cable.lay()
        enter_network(cable.near)                            # for good: this process runs nothing else
    except OSError as error:
        cable.remove()
        pytest.skip(f"no network namespaces here: {error}")
    yield cable
    cable.remove()


def until(condition: Callable[[], bool], timeout_s: float) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() < started + timeout_s, f"not within {timeout_s} s"
        time.sleep(0.005)
    return time.monotonic() - started


def refused(transport: UcxTransport, peer: Peer, imm: Imm) -> bool:
    try:
        transport.write_pages(peer, EVERYTHING, EVERYTHING, imm)
    except PeerGone:
        return True
    return False


def assert_arrives(transport: UcxTransport, pool: KVPool, peer: Peer, far: UcxPeer, imm: Imm) -> None:
    pages_of(pool.tensor)[:] = torch.randint(0, 256, (NUM_PAGES, PAGE_BYTES), dtype=torch.uint8)
    far.call("reset", imm)
    transport.write_pages(peer, EVERYTHING, EVERYTHING, imm)
    far.call("landed_at", imm, NUM_PAGES, 20.0)
    assert far.call("read") == pages_of(pool.tensor).numpy().tobytes()
    assert transport.stop(peer, imm, 5.0)


def test_a_cable_cut_in_mid_transfer_and_joined(cable: Cable, monkeypatch: pytest.MonkeyPatch) -> None:
    """No page is taken for landed while the cable is cut; once joined the link heals, and nobody was restarted."""
    monkeypatch.setenv("UCX_TLS", "tcp,self")                # they share a host, and would use its memory
    transport = UcxTransport(stall_s=1.0)
    pool = transport.allocate(byte_layout(PAGE_BYTES), NUM_PAGES)
    with ucx_peer(PAGE_BYTES, NUM_PAGES, network=cable.far) as far:
        peer = connect_within(transport, far.descriptor, 30.0)
        assert_arrives(transport, pool, peer, far, Imm(2))
        for _ in range(20):
            transport.write_pages(peer, EVERYTHING, EVERYTHING, Imm(1))
        far.call("landed_at", 1, 1, 30.0)
        cable.cut()
        until(lambda: refused(transport, peer, Imm(1)), 30.0)
        assert not transport.stop(peer, Imm(1), 0.5), "what is on the cable may still land"
        assert transport.connect(far.descriptor) is None
        before = far.call("num_landed", 1)
        cable.join()
        until(lambda: transport.stop(peer, Imm(1), 0.0), 15.0)
        landed = far.call("num_landed", 1)                   # what was on the cable may have: now nothing can any more
        assert isinstance(before, int)
        assert isinstance(landed, int)
        assert before <= landed < 20 * NUM_PAGES
        time.sleep(0.3)
        assert far.call("num_landed", 1) == landed
        assert_arrives(transport, pool, connect_within(transport, far.descriptor, 15.0), far, Imm(3))
    transport.close()
