"""The `nvlink` transport between processes that each see one GPU, the same one or two: what arrives, what a stop means, and deaths."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from uuid import uuid4

import msgspec
import pytest
import torch

pytest.importorskip("triton")

from harness.nvlink_peer import NvlinkPeer, nvlink_peer, shuffled
from harness.push_checks import check_push

from diptych.kernels.page_push import PushShape
from diptych.kvtransfer.nvlink.transport import COPY_RUN_BYTES
from diptych.kvtransfer.shm import SHM
from diptych.messages.errors import ClusterError, LayoutMismatch, PeerGone, TransferError
from diptych.messages.membership import MemoryDescriptor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PAGE_BYTES = 32 << 10
NUM_PAGES = 512
TIMEOUT_S = 20.0
SECOND_GPU = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


@dataclass
class Pair:
    cluster: str
    second_gpu: int
    writer: NvlinkPeer
    receiver: NvlinkPeer
    target: MemoryDescriptor


@pytest.fixture(
    scope="module",
    params=[pytest.param(0, marks=pytest.mark.gpu, id="one GPU"), pytest.param(1, marks=[pytest.mark.gpu2, SECOND_GPU], id="two GPUs")],
)
def processes(request: pytest.FixtureRequest) -> Iterator[tuple[str, int, NvlinkPeer, NvlinkPeer]]:
    cluster = f"test{uuid4().hex[:8]}"
    with nvlink_peer(cluster, "writer", 0) as writer, nvlink_peer(cluster, "receiver", request.param) as receiver:
        yield cluster, request.param, writer, receiver
    assert not list(SHM.glob(f"diptych-{cluster}-writer*")), "segments left behind"


@pytest.fixture(params=["sm", "copy"])
def pair(request: pytest.FixtureRequest, processes: tuple[str, int, NvlinkPeer, NvlinkPeer]) -> Pair:
    """Fresh pools in the same processes, connected."""
    cluster, second_gpu, writer, receiver = processes
    writer.tell("open", PAGE_BYTES, NUM_PAGES, request.param)
    target = receiver.call("open", PAGE_BYTES, NUM_PAGES)
    writer.answer()
    writer.call("connect", target)
    return Pair(cluster, second_gpu, writer, receiver, target)


def assert_works(pair: Pair, receiver: NvlinkPeer, target: MemoryDescriptor, seed: int) -> None:
    """All pages arrive where they should, and are counted, no sooner than they are there."""
    src, dst = shuffled(NUM_PAGES, seed), shuffled(NUM_PAGES, seed + 1)
    sums = pair.writer.call("fill", seed)
    receiver.call("reset", seed)
    receiver.tell("read_when_counted", seed, NUM_PAGES, TIMEOUT_S)
    for start in range(0, NUM_PAGES, 100):
        pair.writer.call("write", target, src[start : start + 100], dst[start : start + 100], seed)
    found = receiver.answer()
    assert [found[there] for there in dst] == [sums[here] for here in src]
    assert pair.writer.call("stop", target, seed, TIMEOUT_S)
    assert receiver.call("num_landed", seed) == NUM_PAGES


def until(condition: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up_at, f"not within {TIMEOUT_S} s"
        time.sleep(0.005)


def test_scattered_pages_arrive_and_are_counted(pair: Pair) -> None:
    assert_works(pair, pair.receiver, pair.target, seed=1)
    assert_works(pair, pair.receiver, pair.target, seed=1)             # the same counter, reset
    num_pages, num_bytes, busy_s = pair.writer.call("stats")
    assert (num_pages, num_bytes) == (2 * NUM_PAGES, 2 * NUM_PAGES * PAGE_BYTES)
    assert 0 < busy_s < 1


def test_a_count_never_runs_ahead(pair: Pair) -> None:
    """The receiver reads the pool the moment the count is full, with other bytes each time."""
    for seed in range(10, 20):
        assert_works(pair, pair.receiver, pair.target, seed)


@pytest.mark.parametrize("pair", ["either"], indirect=True)
def test_long_runs_beside_scattered_pages(pair: Pair) -> None:
    """By copy engines and by SMs, for one counter."""
    long = COPY_RUN_BYTES // PAGE_BYTES
    src, dst = [*range(long), *shuffled(NUM_PAGES - long, 1)], [*range(NUM_PAGES - long, NUM_PAGES), *shuffled(NUM_PAGES - long, 2)]
    src[long:] = [long + page for page in src[long:]]
    sums = pair.writer.call("fill", 60)
    pair.receiver.call("reset", 60)
    pair.receiver.tell("read_when_counted", 60, NUM_PAGES, TIMEOUT_S)
    for part in (slice(long, 300), slice(long), slice(300, NUM_PAGES)):
        pair.writer.call("write", pair.target, src[part], dst[part], 60)
    found = pair.receiver.answer()
    assert [found[there] for there in dst] == [sums[here] for here in src]
    assert pair.writer.call("stop", pair.target, 60, TIMEOUT_S)


def test_stop_waits_for_what_has_been_launched(pair: Pair) -> None:
    pair.receiver.call("reset", 30)
    pair.writer.call("stall", 1.0)
    pair.writer.call("write", pair.target, range(NUM_PAGES), range(NUM_PAGES), 30, 8)
    assert pair.writer.call("stop", pair.target, 30, 0.0) is False     # behind the engine's own work
    assert pair.receiver.call("num_landed", 30) == 0
    assert pair.writer.call("stop", pair.target, 31, 0.0) is True      # another handoff
    assert pair.writer.call("stop", pair.target, 30, TIMEOUT_S) is True
    before = pair.receiver.call("sums")
    pair.writer.call("fill", 31)                                       # would show if anything still left
    assert pair.receiver.call("num_landed", 30) == 8 * NUM_PAGES
    assert pair.receiver.call("sums") == before
    assert pair.writer.call("busy_s", pair.target, 30) == 0.0


def test_a_killed_writer_writes_no_more(pair: Pair) -> None:
    with nvlink_peer(pair.cluster, "victim", 0) as victim:
        victim.call("open", PAGE_BYTES, NUM_PAGES)
        victim.call("fill", 40)
        victim.call("connect", pair.target)
        pair.receiver.call("reset", 40)
        victim.tell("write_for_ever", pair.target, shuffled(NUM_PAGES, 1), shuffled(NUM_PAGES, 2), 40)
        pair.receiver.call("landed_at", 40, NUM_PAGES, TIMEOUT_S)
        victim.kill()
        counted, fresh = pair.receiver.call("num_landed", 40), pair.receiver.call("fill", 41)
        time.sleep(0.3)
        assert pair.receiver.call("sums") == fresh
        assert pair.receiver.call("num_landed", 40) == counted
    assert_works(pair, pair.receiver, pair.target, seed=42)


def test_a_killed_receiver_harms_nobody_and_comes_back(pair: Pair) -> None:
    with nvlink_peer(pair.cluster, "victim", pair.second_gpu) as victim:
        old = victim.call("open", PAGE_BYTES, NUM_PAGES)
        pair.writer.call("connect", old)
        assert_works(pair, victim, old, seed=50)
        victim.kill()
    pair.writer.call("write", old, range(NUM_PAGES), range(NUM_PAGES), 51, 20)      # its memory is there for as long as we map it
    assert pair.writer.call("stop", old, 51, TIMEOUT_S) is True
    with nvlink_peer(pair.cluster, "victim", pair.second_gpu, epoch=2) as again:
        new = again.call("open", PAGE_BYTES, NUM_PAGES)
        assert new.location != old.location
        pair.writer.call("connect", new)
        pair.writer.call("write", old, range(NUM_PAGES), range(NUM_PAGES), 52)      # goes to the life that is over
        assert pair.writer.call("stop", old, 52, TIMEOUT_S) is True
        assert again.call("num_landed", 52) == 0
        pair.writer.call("disconnect", old)
        with pytest.raises(PeerGone):
            pair.writer.call("write", old, [0], [0], 52)
        with pytest.raises(PeerGone):
            pair.writer.call("connect", old)
        assert_works(pair, again, new, seed=53)
        pair.writer.call("disconnect", new)
    assert_works(pair, pair.receiver, pair.target, seed=54)


def test_unmapping_waits_and_can_be_repeated(pair: Pair) -> None:
    for seed in range(60, 63):
        pair.receiver.call("reset", seed)
        pair.writer.call("write", pair.target, range(NUM_PAGES), range(NUM_PAGES), seed, 20)
        pair.writer.call("disconnect", pair.target)
        assert pair.receiver.call("num_landed", seed) == 20 * NUM_PAGES
        pair.writer.call("disconnect", pair.target)                    # unknown by now: ignored
        pair.writer.call("connect", pair.target)


def test_what_does_not_fit_is_refused(pair: Pair) -> None:
    with pytest.raises(LayoutMismatch):
        pair.writer.call("connect", msgspec.structs.replace(pair.target, page_bytes=2 * PAGE_BYTES))
    pair.writer.call("disconnect", pair.target)
    with pytest.raises(LayoutMismatch):
        pair.writer.call("connect", msgspec.structs.replace(pair.target, num_pages=10**6))
    pair.writer.call("connect", pair.target)
    for src, dst, imm in (([0], [NUM_PAGES], 0), ([-1], [0], 0), ([NUM_PAGES], [0], 0), ([0, 1], [0], 0), ([0], [0], 4096)):
        with pytest.raises(TransferError):
            pair.writer.call("write", pair.target, src, dst, imm)
    assert_works(pair, pair.receiver, pair.target, seed=70)


@pytest.mark.gpu
def test_more_memory_than_there_is_is_refused() -> None:
    cluster = f"test{uuid4().hex[:8]}"
    with nvlink_peer(cluster, "greedy", 0) as greedy:
        with pytest.raises(ClusterError, match=f"{2**42} bytes of GPU memory wanted"):
            greedy.call("open", 1 << 20, 1 << 22)
        greedy.call("open", PAGE_BYTES, NUM_PAGES)


@pytest.mark.gpu
@pytest.mark.parametrize("num_programs", [1, 4, 132])
@pytest.mark.parametrize(("page_words", "num_pages"), [(256, 999), (512, 4096), (12_288, 70), (8192, 600), (32_768, 129), (64, 0)])
def test_page_push(page_words: int, num_pages: int, num_programs: int) -> None:
    check_push(page_words, num_pages, PushShape(num_programs), torch.device("cuda"))
