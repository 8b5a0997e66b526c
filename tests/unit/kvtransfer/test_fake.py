"""The fake fabric behaves like a NIC: what has left cannot be called back, lands in any order, and is counted as it lands."""

import pytest
import torch

from diptych.kvtransfer.fake import FakeFabric, FakeTransport, as_pages
from diptych.kvtransfer.layout import KVLayout
from diptych.kvtransfer.transport import KVPool
from diptych.messages.errors import LayoutMismatch, PeerGone
from diptych.messages.ids import Imm

LAYOUT = KVLayout("test", torch.int64, num_layers=2, num_kv_heads=1, head_dim=1, block_size=2)
IMM = Imm(5)


class Side:
    def __init__(self, fabric: FakeFabric, name: str, layout: KVLayout = LAYOUT) -> None:
        self.transport: FakeTransport = fabric.transport(name)
        self.pool: KVPool = self.transport.allocate(layout, 4)
        self.descriptor = self.transport.register(self.pool)


@pytest.fixture
def fabric() -> FakeFabric:
    return FakeFabric()


@pytest.fixture
def writer(fabric: FakeFabric) -> Side:
    side = Side(fabric, "writer")
    as_pages(side.pool)[:] = torch.arange(1, 9)[:, None]
    return side


@pytest.fixture
def receiver(fabric: FakeFabric) -> Side:
    return Side(fabric, "receiver")


def test_pages_and_their_count_land_as_one_and_in_any_order(fabric: FakeFabric, writer: Side, receiver: Side) -> None:
    peer = writer.transport.connect(receiver.descriptor)
    writer.transport.write_pages(peer, [0, 1], [7, 2], IMM)
    writer.transport.write_pages(peer, [4], [0], IMM)
    assert receiver.transport.num_landed(IMM) == 0
    fabric.land(1)
    assert receiver.transport.num_landed(IMM) == 1
    fabric.land_all()
    assert receiver.transport.num_landed(IMM) == 3
    assert as_pages(receiver.pool)[:, 0].tolist() == [5, 0, 2, 0, 0, 0, 0, 1]
    receiver.transport.reset(IMM)
    assert receiver.transport.num_landed(IMM) == 0


def test_a_write_holds_what_its_pages_held_when_it_left(fabric: FakeFabric, writer: Side, receiver: Side) -> None:
    writer.transport.write_pages(writer.transport.connect(receiver.descriptor), [0], [0], IMM)
    writer.pool.tensor.zero_()
    fabric.land_all()
    assert as_pages(receiver.pool)[0, 0] == 1


def test_stop_is_true_only_once_nothing_of_the_ticket_is_in_flight(fabric: FakeFabric, writer: Side, receiver: Side) -> None:
    peer = writer.transport.connect(receiver.descriptor)
    writer.transport.write_pages(peer, [0], [0], IMM)
    assert not writer.transport.settled(peer, IMM)
    assert not writer.transport.stop(peer, IMM, 1.0)
    assert writer.transport.stop(peer, Imm(6), 0.0)
    assert writer.transport.settled(peer, Imm(6))
    fabric.land_all()
    assert writer.transport.settled(peer, IMM)
    assert writer.transport.stop(peer, IMM, 0.0)


def test_a_dead_writers_writes_land_until_it_is_fenced(fabric: FakeFabric, writer: Side, receiver: Side) -> None:
    peer, back = writer.transport.connect(receiver.descriptor), receiver.transport.connect(writer.descriptor)
    writer.transport.write_pages(peer, [0], [0], IMM)
    receiver.transport.write_pages(back, [0], [3], IMM)
    receiver.transport.write_pages(back, [0], [4], IMM)
    receiver.transport.close()
    fabric.land(1)
    assert writer.transport.num_landed(IMM) == 1
    assert writer.transport.fence(receiver.descriptor, 0.0)
    fabric.land_all()
    assert not receiver.pool.tensor.any()
    assert writer.transport.num_landed(IMM) == 1
    with pytest.raises(PeerGone, match="receiver"):
        writer.transport.write_pages(peer, [0], [0], IMM)
    with pytest.raises(PeerGone, match="receiver"):
        writer.transport.connect(receiver.descriptor)


def test_other_page_sizes_are_refused(fabric: FakeFabric, writer: Side) -> None:
    other = Side(fabric, "other", KVLayout("test", torch.int64, 2, 1, 1, block_size=4))
    with pytest.raises(LayoutMismatch, match="pages of 64 bytes there, 32 here"):
        writer.transport.connect(other.descriptor)
