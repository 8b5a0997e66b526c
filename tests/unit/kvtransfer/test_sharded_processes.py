"""Workers of several ranks in processes of their own, over real transports of host memory: what arrives, and what is left of the dead."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import uuid4

import pytest
from harness.shard_process import TIMEOUT_S, ShardProcess, assert_silent_once_killed, assert_works, shard_process, shuffled
from harness.ucx import needs_ucx

from diptych.kvtransfer.shm import SHM, sweep_orphans
from diptych.messages.errors import PeerGone

BLOCKS, LAYERS = 64, 3
NUM_PAGES = BLOCKS * LAYERS
TPS = [(1, 2), (2, 1), (2, 2), (2, 4), (4, 2)]


@dataclass
class Pair:
    cluster: str
    tps: tuple[int, int]
    writer: ShardProcess
    receiver: ShardProcess


@pytest.fixture(scope="module", params=["shm", pytest.param("ucx", marks=needs_ucx)])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=TPS, ids=lambda tps: f"{tps[0]} to {tps[1]}")
def pair(request: pytest.FixtureRequest, transport: str) -> Iterator[Pair]:
    cluster, (here, there) = f"test{uuid4().hex[:8]}", request.param
    with (
        shard_process(transport, cluster, "prefill-0", ["cpu"] * here, BLOCKS) as writer,
        shard_process(transport, cluster, "decode-0", ["cpu"] * there, BLOCKS) as receiver,
    ):
        writer.call("connect", receiver.target)
        yield Pair(cluster, request.param, writer, receiver)
    assert not list(SHM.glob(f"diptych-{cluster}*")), "segments left behind"


def test_pages_arrive_whole(pair: Pair) -> None:
    before = pair.writer.call("stats")
    assert_works(pair.writer, pair.receiver, shuffled(1, NUM_PAGES, 100), 1)
    assert_works(pair.writer, pair.receiver, shuffled(2, NUM_PAGES, 100), 2)
    num_pages, num_bytes, busy_s = (now - then for now, then in zip(pair.writer.call("stats"), before, strict=True))
    assert (num_pages, num_bytes) == (200, 200 * 2 * 4 * 4 * 8 * 4)
    assert busy_s > 0


def test_what_is_stopped_writes_no_more(pair: Pair, transport: str) -> None:
    """Pages that are dropped are never counted, so what lacks them is never taken for whole."""
    pages, times = shuffled(3, NUM_PAGES), 200
    pair.receiver.call("reset", 3)
    assert pair.writer.call("write_and_stop", pair.receiver.target, pages, 3, times, TIMEOUT_S)
    counted, before = pair.receiver.call("num_landed", 3), pair.receiver.call("read")
    if transport == "shm":
        assert counted < times * NUM_PAGES * 8, "all had left: nothing was tried"
    pair.writer.call("fill", 5)                                  # would show if anything still left
    time.sleep(0.05)
    assert pair.receiver.call("num_landed", 3) == counted
    assert (pair.receiver.call("read") == before).all()
    assert pair.writer.call("busy_s", pair.receiver.target, 3) == 0.0
    assert_works(pair.writer, pair.receiver, shuffled(4, NUM_PAGES, 100), 4)


def test_a_killed_writer_is_fenced_with_all_its_ranks(pair: Pair, transport: str) -> None:
    with shard_process(transport, pair.cluster, "prefill-1", ["cpu"] * pair.tps[0], BLOCKS) as victim:
        victim.call("connect", pair.receiver.target)
        victim.call("fill", 7)
        assert_silent_once_killed(victim, pair.receiver, NUM_PAGES, 5, TIMEOUT_S)
    left = sorted(path.name for path in SHM.glob(f"diptych-{pair.cluster}-prefill-1*"))
    ranks = ["", *(f".{rank}" for rank in range(1, pair.tps[0]))] if transport == "shm" else []
    assert left == sorted(f"diptych-{pair.cluster}-prefill-1{rank}-1" for rank in ranks)
    assert sorted(sweep_orphans(pair.cluster)) == left, "a rank's segment is left behind, or somebody else's is not"
    assert_works(pair.writer, pair.receiver, shuffled(6, NUM_PAGES, 100), 6)


def test_a_killed_receiver_comes_back(pair: Pair, transport: str) -> None:
    with shard_process(transport, pair.cluster, "decode-1", ["cpu"] * pair.tps[1], BLOCKS) as victim:
        old = victim.target
        pair.writer.call("connect", old)
        assert_works(pair.writer, victim, shuffled(7, NUM_PAGES, 100), 7)
        victim.kill()
    with shard_process(transport, pair.cluster, "decode-1", ["cpu"] * pair.tps[1], BLOCKS, epoch=2) as again:
        pair.writer.call("disconnect", old)
        with pytest.raises(PeerGone):
            pair.writer.call("write", old, {0: 0}, 8)
        pair.writer.call("connect", again.target)
        assert_works(pair.writer, again, shuffled(9, NUM_PAGES, 100), 9)
        pair.writer.call("disconnect", again.target)
        assert pair.writer.call("num_mapped", "decode-1") == 0
    assert_works(pair.writer, pair.receiver, shuffled(10, NUM_PAGES, 100), 10)
