"""The `ucx` transport between two pools in GPU memory, over CUDA IPC where UCX has that."""

import random
from collections.abc import Iterator

import pytest
import torch
from harness.ucx import needs_ucx
from harness.ucx_peer import UcxPeer, byte_layout, pages_of, ucx_peer

from diptych.kvtransfer.transport import KVPool, connect_within
from diptych.kvtransfer.ucx.transport import UcxTransport
from diptych.messages.errors import ClusterError
from diptych.messages.ids import Imm

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"), needs_ucx]
SECOND_GPU = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")

PAGE_BYTES, NUM_PAGES, TIMEOUT_S = 64 << 10, 256, 20.0
SLEEP_CYCLES = 400_000_000                                    # of a GPU: about 0.2 s


@pytest.fixture
def writer() -> Iterator[tuple[UcxTransport, KVPool]]:
    transport = UcxTransport(torch.device("cuda:0"))
    try:
        pool = transport.allocate(byte_layout(PAGE_BYTES), NUM_PAGES)
    except ClusterError as error:
        if "does not move GPU memory" not in str(error):
            raise
        pytest.skip(str(error))
    yield transport, pool
    transport.close()


@pytest.fixture(
    params=[pytest.param(0, marks=pytest.mark.gpu, id="one GPU"), pytest.param(1, marks=[pytest.mark.gpu2, SECOND_GPU], id="two GPUs")]
)
def receiver(request: pytest.FixtureRequest, writer: tuple[UcxTransport, KVPool]) -> Iterator[UcxPeer]:
    with ucx_peer(PAGE_BYTES, NUM_PAGES, device=f"cuda:{request.param}") as peer:
        yield peer


def test_pages_arrive_as_the_stream_left_them(writer: tuple[UcxTransport, KVPool], receiver: UcxPeer) -> None:
    transport, pool = writer
    peer = connect_within(transport, receiver.descriptor, TIMEOUT_S)
    for seed in range(1, 4):
        target = random.Random(seed).sample(range(NUM_PAGES), NUM_PAGES)
        expected = torch.randint(0, 256, (NUM_PAGES, PAGE_BYTES), dtype=torch.uint8)
        receiver.call("reset", seed)
        torch.cuda._sleep(SLEEP_CYCLES)
        pages_of(pool.tensor).copy_(expected.to("cuda:0", non_blocking=True))
        transport.write_pages(peer, range(NUM_PAGES), target, Imm(seed))
        receiver.call("landed_at", seed, NUM_PAGES, TIMEOUT_S)
        landed = torch.frombuffer(bytearray(receiver.call("read")), dtype=torch.uint8).view(NUM_PAGES, PAGE_BYTES)
        assert torch.equal(landed[target], expected)
        assert transport.stop(peer, Imm(seed), TIMEOUT_S)


def test_what_is_stopped_before_it_is_computed_never_leaves(writer: tuple[UcxTransport, KVPool], receiver: UcxPeer) -> None:
    transport, _ = writer
    peer = connect_within(transport, receiver.descriptor, TIMEOUT_S)
    torch.cuda._sleep(SLEEP_CYCLES)
    transport.write_pages(peer, range(NUM_PAGES), range(NUM_PAGES), Imm(1))
    assert transport.stop(peer, Imm(1), TIMEOUT_S)
    torch.cuda.synchronize()
    assert receiver.call("num_landed", 1) == 0
