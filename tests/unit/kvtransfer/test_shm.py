"""Pages between real segments in /dev/shm: what lands and is counted, what a stop means, and a writer in a process of its own."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import msgspec
import pytest
import torch
from harness import shm_process
from harness.shm_process import LAYOUT, NUM_PAGES
from harness.shm_sides import IMM, TIMEOUT_S, Side, landed, wait_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diptych.kvtransfer.shm import SHM, sweep_orphans
from diptych.kvtransfer.transport import NUM_IMMS, Peer
from diptych.messages.errors import PeerGone, TransferError
from diptych.messages.ids import Imm
from diptych.messages.membership import MemoryDescriptor


class Held(list[int]):
    """Source pages over which the copying thread stands still until it is let go."""

    def __init__(self, pages: list[int]) -> None:
        super().__init__(pages)
        self.reached, self.let_go = threading.Event(), threading.Event()

    def __iter__(self) -> Iterator[int]:
        if threading.current_thread().name == "shm-writer":
            self.reached.set()
            assert self.let_go.wait(TIMEOUT_S)
        return super().__iter__()


def hold(writer: Side, peer: Peer, imm: Imm = IMM) -> Held:
    """A write that is under way until told otherwise."""
    pages = Held([0])
    writer.transport.write_pages(peer, pages, [0], imm)
    assert pages.reached.wait(TIMEOUT_S)
    return pages


# Pages and counts

@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_pages_land_where_they_are_sent(sides: tuple[Side, Side], draw: st.DataObject) -> None:
    writer, receiver = sides
    receiver.pool.tensor.zero_()
    src = draw.draw(st.lists(st.integers(0, NUM_PAGES - 1), max_size=12))
    dst = draw.draw(st.lists(st.integers(0, NUM_PAGES - 1), min_size=len(src), max_size=len(src), unique=True))
    imm = Imm(draw.draw(st.integers(0, NUM_IMMS - 1)))
    receiver.transport.reset(imm)
    peer = writer.transport.connect(receiver.descriptor)
    cut = draw.draw(st.integers(0, len(src)))
    for part in (slice(cut), slice(cut, None)):
        writer.transport.write_pages(peer, src[part], dst[part], imm)
    landed(receiver, imm, len(src))
    expected = torch.zeros(NUM_PAGES, dtype=torch.int64)
    expected[dst] = torch.tensor(src, dtype=torch.int64) + 1
    assert receiver.pages.tolist() == expected.tolist()


def test_counters_are_apart_and_reset_alone(sides: tuple[Side, Side]) -> None:
    writer, receiver = sides
    peer = writer.transport.connect(receiver.descriptor)
    for imm in (0, 1, NUM_IMMS - 1):
        writer.transport.write_pages(peer, list(range(imm % 5 + 1)), list(range(imm % 5 + 1)), Imm(imm))
    for imm in (0, 1, NUM_IMMS - 1):
        landed(receiver, Imm(imm), imm % 5 + 1)
    receiver.transport.reset(Imm(1))
    assert [receiver.transport.num_landed(Imm(imm)) for imm in (0, 1, NUM_IMMS - 1)] == [1, 0, 1]
    assert receiver.pages[0] == 1, "the last counter lies right before the first page"


def test_both_ways_at_once(sides: tuple[Side, Side]) -> None:
    a, b = sides
    to_b, to_a = a.transport.connect(b.descriptor), b.transport.connect(a.descriptor)
    b.pool.tensor[1, 0] = 77
    a.transport.write_pages(to_b, [0], [0], IMM)
    b.transport.write_pages(to_a, [2], [5], IMM)
    landed(b, IMM, 1)
    landed(a, IMM, 1)
    assert (a.pages[5], b.pages[0]) == (77, 1)


def test_stats_and_busy_time(sides: tuple[Side, Side]) -> None:
    writer, receiver = sides
    peer = writer.transport.connect(receiver.descriptor)
    writer.transport.write_pages(peer, [0, 1, 2], [3, 4, 5], IMM)
    wait_for(lambda: writer.transport.stats.num_pages == 3)
    stats = writer.transport.stats
    assert stats.num_bytes == 3 * LAYOUT.page_bytes
    assert writer.transport.busy_s(peer, IMM) == pytest.approx(stats.busy_s)
    assert stats.busy_s > 0
    assert writer.transport.stop(peer, IMM, TIMEOUT_S)
    assert writer.transport.busy_s(peer, IMM) == 0
    assert writer.transport.stats == stats


@pytest.mark.parametrize(
    ("src", "dst", "imm"),
    [
        ([0], [NUM_PAGES], 0),
        ([0], [-1], 0),
        ([NUM_PAGES], [0], 0),
        ([-1], [0], 0),
        ([0, 1], [0], 0),
        ([0], [0], NUM_IMMS),
        ([0], [0], -1),
    ],
)
def test_what_lies_outside_is_refused_before_anything_moves(sides: tuple[Side, Side], src: list[int], dst: list[int], imm: int) -> None:
    writer, receiver = sides
    peer = writer.transport.connect(receiver.descriptor)
    with pytest.raises(TransferError, match=str(NUM_PAGES if 0 <= imm < NUM_IMMS and len(src) == len(dst) else NUM_IMMS)):
        writer.transport.write_pages(peer, src, dst, Imm(imm))
    writer.transport.write_pages(peer, [7], [8], IMM)                 # the copying thread is well
    landed(receiver, IMM, 1)
    assert receiver.pages.count_nonzero() == 1


# Stopping

def test_stop_drops_what_waits_and_what_is_left_of_what_is_under_way(sides: tuple[Side, Side]) -> None:
    writer, receiver = sides
    peer = writer.transport.connect(receiver.descriptor)
    held = hold(writer, peer)
    writer.transport.write_pages(peer, [1], [1], IMM)
    writer.transport.write_pages(peer, [2], [2], Imm(9))
    assert not writer.transport.stop(peer, IMM, 0.0)
    assert not writer.transport.stop(peer, IMM, 0.01)
    assert receiver.transport.num_landed(IMM) == 0, "counted before it was there"
    held.let_go.set()
    assert writer.transport.stop(peer, IMM, TIMEOUT_S)
    landed(receiver, Imm(9), 1)                                       # another handoff's writes go on
    assert receiver.transport.num_landed(IMM) == 0
    assert receiver.pages[:3].tolist() == [0, 0, 3]


def test_a_write_that_is_stopped_halfway_counts_for_nothing(sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sources may be computed over from then on."""
    writer, receiver = sides
    reached, go_on = threading.Event(), threading.Event()

    class Slow:
        def __getitem__(self, page: int) -> Any:
            reached.set()
            assert go_on.wait(TIMEOUT_S)
            return pages[page]

        def __len__(self) -> int:
            return len(pages)

    pages = writer.transport._own.pages
    monkeypatch.setattr(writer.transport._own, "pages", Slow())
    peer = writer.transport.connect(receiver.descriptor)
    writer.transport.write_pages(peer, [0, 1, 2], [3, 4, 5], Imm(7))
    assert reached.wait(TIMEOUT_S)
    assert not writer.transport.stop(peer, Imm(7), 0.0)
    go_on.set()
    assert writer.transport.stop(peer, Imm(7), TIMEOUT_S)
    assert (receiver.transport.num_landed(Imm(7)), writer.transport.stats.num_pages) == (0, 1)
    writer.transport.write_pages(peer, [0], [3], Imm(7))
    wait_for(lambda: receiver.transport.num_landed(Imm(7)) == 1)


def test_pages_are_settled_once_none_of_their_ticket_waits_or_is_read(sides: tuple[Side, Side]) -> None:
    """Asking changes nothing: what waits still goes."""
    writer, receiver = sides
    peer = writer.transport.connect(receiver.descriptor)
    held = hold(writer, peer)
    writer.transport.write_pages(peer, [1], [1], Imm(9))
    assert not writer.transport.settled(peer, IMM), "one is being read"
    assert not writer.transport.settled(peer, Imm(9)), "one waits"
    assert writer.transport.settled(peer, Imm(10))
    held.let_go.set()
    landed(receiver, Imm(9), 1)
    wait_for(lambda: writer.transport.settled(peer, IMM) and writer.transport.settled(peer, Imm(9)))
    assert receiver.pages[:2].tolist() == [1, 2]


def test_stop_does_not_wait_for_others(sides: tuple[Side, Side]) -> None:
    writer, receiver = sides
    peer = writer.transport.connect(receiver.descriptor)
    held = hold(writer, peer)
    assert writer.transport.stop(peer, Imm(9), 0.0)
    held.let_go.set()


def test_disconnect_waits_for_what_is_under_way_and_drops_the_rest(sides: tuple[Side, Side]) -> None:
    writer, receiver = sides
    peer = writer.transport.connect(receiver.descriptor)
    held = hold(writer, peer)
    writer.transport.write_pages(peer, [1], [1], IMM)
    waiting = threading.Thread(target=writer.transport.disconnect, args=(peer,))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive(), "unmapped under the copying thread"
    held.let_go.set()
    waiting.join(TIMEOUT_S)
    assert not waiting.is_alive()
    assert receiver.pages[:2].tolist() == [1, 0]
    assert writer.transport.busy_s(peer, IMM) == 0
    with pytest.raises(PeerGone, match="decode-0"):
        writer.transport.write_pages(peer, [1], [1], IMM)
    writer.transport.disconnect(peer)
    again = writer.transport.connect(receiver.descriptor)
    writer.transport.write_pages(again, [4], [4], Imm(0))
    landed(receiver, Imm(0), 1)


def test_a_copying_thread_that_fails_ends_the_process_instead_of_its_handoffs(sides: tuple[Side, Side]) -> None:
    writer, receiver = sides
    peer = writer.transport.connect(receiver.descriptor)
    source = hold(writer, peer)
    source.append(1)                          # one page more than there are places
    source.let_go.set()
    writer.transport._thread.join(TIMEOUT_S)
    calls: list[Callable[[], object]] = [
        lambda: writer.transport.stop(peer, IMM, TIMEOUT_S),
        lambda: writer.transport.write_pages(peer, [0], [0], IMM),
        lambda: writer.transport.disconnect(peer),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="copies pages has ended"):
            call()
    assert receiver.transport.num_landed(IMM) == 0


# With a second process

@pytest.fixture
def other(cluster: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, shm_process.__file__, cluster, "prefill-0"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.communicate(timeout=TIMEOUT_S)


def test_counts_from_another_process_are_exact_never_early_and_its_death_is_swept(cluster: str, other: subprocess.Popen[str]) -> None:
    assert other.stdin is not None
    assert other.stdout is not None
    receiver = Side(cluster, "decode-0")
    location = msgspec.msgpack.decode(bytes.fromhex(other.stdout.readline()), type=MemoryDescriptor).location.decode()
    order = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(1)).tolist()
    jobs, start = [], 0
    for size in (1, 2, 3, 5, 8, 13, 21, 34):
        jobs.append((list(range(start, start + size)), order[start : start + size]))
        start += size
    peer = msgspec.msgpack.encode(receiver.descriptor).hex()
    other.stdin.writelines(json.dumps({"peer": peer, "src": src, "dst": dst, "imm": IMM}) + "\n" for src, dst in jobs)
    other.stdin.flush()
    counts = {0}
    give_up_at = monotonic() + TIMEOUT_S
    while max(counts) < start:
        assert monotonic() < give_up_at
        count = receiver.transport.num_landed(IMM)
        assert receiver.pages[order[:count]].tolist() == list(range(1, count + 1)), "counted before it was there"
        assert count >= max(counts)
        counts.add(count)
    assert counts <= {sum(len(src) for src, _ in jobs[:n]) for n in range(len(jobs) + 1)}

    assert sweep_orphans(cluster) == [], "its owner lives"
    other.kill()
    other.wait(TIMEOUT_S)
    assert (SHM / location).exists()
    assert sweep_orphans(cluster) == [location]
    assert not (SHM / location).exists()
    receiver.transport.close()
