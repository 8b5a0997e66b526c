"""Workers of one and of two ranks, each on a GPU of its own, exchange pages over NVLink and UCX; every process sees both GPUs."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from uuid import uuid4

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from harness.shard_process import TIMEOUT_S, ShardProcess, assert_silent_once_killed, assert_works, shard_process, shuffled
from harness.shards import fill, layout_of, whole
from harness.ucx import needs_ucx

from diptych.kvtransfer.bundle import TransportBundle
from diptych.kvtransfer.local import LocalTransport
from diptych.kvtransfer.sharded import KVShards, ShardedBundle
from diptych.kvtransfer.shm import SHM, sweep_orphans
from diptych.kvtransfer.staging import Staging
from diptych.kvtransfer.transport import KVPool
from diptych.messages.errors import ClusterError, PeerGone

pytestmark = [pytest.mark.gpu2, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")]

BLOCKS, LAYERS = 512, 3
NUM_PAGES = BLOCKS * LAYERS
BOTH, FIRST, SECOND = ("cuda:0", "cuda:1"), ("cuda:0",), ("cuda:1",)
SWAPPED = BOTH[::-1]


@dataclass
class Pair:
    cluster: str
    devices: tuple[tuple[str, ...], tuple[str, ...]]
    writer: ShardProcess
    receiver: ShardProcess


@pytest.fixture(
    scope="module",
    params=[(BOTH, FIRST), (BOTH, SECOND), (FIRST, BOTH), (SECOND, BOTH), (BOTH, BOTH), (BOTH, SWAPPED)],
    ids=lambda devices: " to ".join("+".join(each) for each in devices),
)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    cluster, (here, there) = f"test{uuid4().hex[:8]}", request.param
    with (
        shard_process("nvlink", cluster, "prefill-0", here, BLOCKS) as writer,
        shard_process("nvlink", cluster, "decode-0", there, BLOCKS) as receiver,
    ):
        writer.call("connect", receiver.target)
        yield Pair(cluster, request.param, writer, receiver)
    assert not list(SHM.glob(f"diptych-{cluster}*")), "segments left behind"


@pytest.mark.parametrize("current", [0, 1])
def test_pages_arrive_whole_whichever_device_is_current(pair: Pair, current: int) -> None:
    for process in (pair.writer, pair.receiver):
        process.call("set_device", current)
    for seed in range(10 * current, 10 * current + 4):
        assert_works(pair.writer, pair.receiver, shuffled(seed, NUM_PAGES, 1000), seed)
    assert pair.writer.call("stats")[2] > 0
    for process in (pair.writer, pair.receiver):
        assert process.call("current_device") == current


@pytest.mark.parametrize("current", [0, 1])
def test_pages_wait_for_the_streams_of_their_own_ranks(pair: Pair, current: int) -> None:
    pair.writer.call("set_device", current)
    pages = shuffled(30, NUM_PAGES)
    pair.receiver.call("reset", 30)
    pair.writer.call("stall", 1.0)
    pair.writer.call("write", pair.receiver.target, pages, 30)
    assert not pair.writer.call("stop", pair.receiver.target, 30, 0.0)
    assert pair.receiver.call("num_landed", 30) == 0, "a rank's pages left before they were computed"
    assert pair.writer.call("stop", pair.receiver.target, 30, TIMEOUT_S)
    assert pair.receiver.call("num_landed", 30) == NUM_PAGES * 8
    assert pair.writer.call("busy_s", pair.receiver.target, 30) == 0.0


@pytest.mark.parametrize("current", [0, 1])
def test_unmapping_leaves_nothing_and_can_be_repeated(pair: Pair, current: int) -> None:
    pair.writer.call("set_device", current)
    for _ in range(2):
        pair.writer.call("disconnect", pair.receiver.target)
        pair.writer.call("disconnect", pair.receiver.target)
        assert pair.writer.call("num_mapped", f"{pair.cluster}-decode-0") == 0
        with pytest.raises(PeerGone):
            pair.writer.call("write", pair.receiver.target, {0: 0}, 40)
        pair.writer.call("connect", pair.receiver.target)
    assert_works(pair.writer, pair.receiver, shuffled(41, NUM_PAGES, 1000), 41)


def test_the_dead_write_no_more_and_come_back(pair: Pair) -> None:
    with shard_process("nvlink", pair.cluster, "prefill-1", pair.devices[0], BLOCKS) as victim:
        victim.call("connect", pair.receiver.target)
        assert_silent_once_killed(victim, pair.receiver, NUM_PAGES, 50, 1.0)
    assert len(sweep_orphans(pair.cluster)) == len(pair.devices[0])
    with shard_process("nvlink", pair.cluster, "decode-1", pair.devices[1], BLOCKS) as victim:
        old = victim.target
        pair.writer.call("connect", old)
        assert_works(pair.writer, victim, shuffled(52, NUM_PAGES, 1000), 52)
        victim.kill()
    with shard_process("nvlink", pair.cluster, "decode-1", pair.devices[1], BLOCKS, epoch=2) as again:
        pair.writer.call("disconnect", old)
        pair.writer.call("connect", again.target)
        assert_works(pair.writer, again, shuffled(53, NUM_PAGES, 1000), 53)
        pair.writer.call("disconnect", again.target)
    assert_works(pair.writer, pair.receiver, shuffled(54, NUM_PAGES, 1000), 54)


@needs_ucx
@pytest.mark.parametrize(("here", "there"), [(BOTH, FIRST), (SECOND, BOTH), (BOTH, BOTH), (BOTH, SWAPPED)])
def test_over_ucx_pages_arrive_whole_and_the_dead_write_no_more(here: tuple[str, ...], there: tuple[str, ...]) -> None:
    cluster = f"test{uuid4().hex[:8]}"
    with ExitStack() as stack:
        try:
            receiver = stack.enter_context(shard_process("ucx", cluster, "decode-0", there, BLOCKS))
        except ClusterError as error:
            if "does not move GPU memory" not in str(error):
                raise
            pytest.skip(str(error))
        writer, victim = (stack.enter_context(shard_process("ucx", cluster, f"prefill-{i}", here, BLOCKS)) for i in range(2))
        for process in (writer, victim):
            process.call("connect", receiver.target)
        for current in (0, 1):
            for process in (writer, receiver):
                process.call("set_device", current)
            assert_works(writer, receiver, shuffled(current, NUM_PAGES, 1000), current)
        assert_silent_once_killed(victim, receiver, NUM_PAGES, 50, TIMEOUT_S)
        assert_works(writer, receiver, shuffled(54, NUM_PAGES, 1000), 54)


def test_each_rank_converts_on_its_own_gpu() -> None:
    """What two GPUs make together is what two CPUs would."""
    made, layout = [], layout_of(2, torch.float32)
    scales = torch.rand(LAYERS, 2, 4, generator=torch.Generator().manual_seed(0)) + 0.25
    for devices in (("cpu", "cpu"), BOTH):
        source = KVShards(layout, tuple(KVPool(layout, torch.zeros(layout.shape(4), device=device)) for device in devices))
        fill(source)
        bundle = ShardedBundle([TransportBundle([LocalTransport(torch.device(device))]) for device in devices])
        there = replace(layout, dtype=torch.float8_e4m3fn, block_size=2)
        staging = Staging(source, bundle.allocate(there, 3), bundle, scales)
        staging.make(np.array([0, 1, 2, 4, 5, 8]), np.array([3, 7, 1, 0, 8, 2]), np.array([2, 0, 3]))
        for device in BOTH:
            torch.cuda.synchronize(device)
        made.append(whole(KVShards(there, tuple(KVPool(there, pool.tensor.float()) for pool in staging.pool.ranks))))
    assert torch.equal(*made)
    assert made[0].any()
