"""The parts of the transport `nvlink` that need no GPU: locations, counters, page ids, and what is refused before anything is mapped."""

import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import cycle, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diptych.kvtransfer.nvlink import cudart, memory
from diptych.kvtransfer.nvlink.busy import MAX_GAPS, BusyTime
from diptych.kvtransfer.nvlink.counters import OwnCounters, PeerCounters
from diptych.kvtransfer.nvlink.memory import THIS_PROCESS, VERSION, Location, PeerMemory, check_page_bytes, location_here
from diptych.kvtransfer.nvlink.pages import SMALLEST, Slot, Slots, are_scattered, as_told, runs_of
from diptych.kvtransfer.shm import SHM, host_identity, sweep_orphans
from diptych.kvtransfer.transport import FEW_PAGES, NUM_IMMS, Peer
from diptych.messages.errors import ClusterError, LayoutMismatch, PeerGone, TransferError
from diptych.messages.ids import Epoch, Imm, WorkerId
from diptych.messages.membership import MemoryDescriptor

LOCATION = Location(VERSION, THIS_PROCESS, bytes(range(64)), 0x7F00_0000_0000, 0, 1 << 30, "diptych-c-w-1.counts")
DESCRIPTOR = MemoryDescriptor("nvlink", host_identity(), LOCATION.pack(), 10, 4096, NUM_IMMS)


@pytest.fixture
def counters() -> Iterator[OwnCounters]:
    own = OwnCounters(f"test{uuid4().hex[:8]}", WorkerId("decode-0"), Epoch(1))
    yield own
    own.close()
    assert not (SHM / own.name).exists()


def test_a_location_survives_the_wire() -> None:
    assert Location.unpack(LOCATION.pack()) == LOCATION
    assert location_here(DESCRIPTOR) == LOCATION


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\x00",
        LOCATION.pack()[:-1],
        msgspec.structs.replace(LOCATION, version=2).pack(),
        msgspec.structs.replace(LOCATION, handle=b"short").pack(),
    ],
    ids=["empty", "a byte", "cut", "version", "handle"],     # THIS_PROCESS is in it, and another in each process that collects
)
def test_a_location_that_is_none_is_refused(packed: bytes) -> None:
    with pytest.raises(PeerGone):
        Location.unpack(packed)


def test_another_host_is_refused() -> None:
    with pytest.raises(PeerGone, match="GPU memory of elsewhere"):
        location_here(msgspec.structs.replace(DESCRIPTOR, host="elsewhere"))


def test_another_page_size_is_refused() -> None:
    with pytest.raises(LayoutMismatch, match="pages of 4096 bytes there, 8192 here"):
        check_page_bytes(DESCRIPTOR, 8192)


def test_a_known_peer_costs_no_look_at_the_host_and_is_still_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each handoff connects. On a virtual machine the look took as long as a message."""
    pytest.importorskip("triton")
    from diptych.kvtransfer.nvlink.transport import NvlinkTransport, _Target

    transport = NvlinkTransport("c", WorkerId("w"), Epoch(1), torch.device("cuda", 0))
    transport._page_bytes = DESCRIPTOR.page_bytes
    transport._targets[DESCRIPTOR.location] = _Target(SimpleNamespace(), DESCRIPTOR.num_pages)
    monkeypatch.setattr(memory, "host_identity", lambda: pytest.fail("it looked"))
    assert transport.connect(DESCRIPTOR).descriptor == DESCRIPTOR
    with pytest.raises(LayoutMismatch, match="pages of 8192 bytes there, 4096 here"):
        transport.connect(msgspec.structs.replace(DESCRIPTOR, page_bytes=8192))


@pytest.mark.parametrize("pool_bytes", [0, (1 << 30) + 1])
def test_more_pages_than_memory_are_refused(pool_bytes: int) -> None:
    with pytest.raises(LayoutMismatch, match=f"{pool_bytes} bytes of pages announced"):
        PeerMemory(LOCATION, pool_bytes, 0)


class FakeCuda:
    """Calls by name; `fails` names those that do not work. What is registered and opened is what somebody must still undo."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.registered: set[int] = set()
        self.opened: set[int] = set()

    def check(self, call: str, *arguments: Any) -> None:
        if call == self.fails:
            raise cudart.CudaError(call, 1, "invalid argument")
        match call:
            case "cudaHostRegister":
                self.registered.add(arguments[0])
            case "cudaHostUnregister":
                self.registered.remove(arguments[0])
            case "cudaHostGetDevicePointer":
                arguments[0]._obj.value = 0x1000
            case "cudaIpcOpenMemHandle":
                arguments[0]._obj.value = 0x2000
                self.opened.add(0x2000)
            case "cudaIpcCloseMemHandle":
                self.opened.remove(arguments[0])


def num_mappings(counters: OwnCounters) -> int:
    return Path("/proc/self/maps").read_text().count(counters.name)


@pytest.mark.parametrize("fails", ["cudaHostRegister", "cudaHostGetDevicePointer", "cudaIpcOpenMemHandle"])
def test_a_mapping_that_fails_half_way_leaves_nothing_behind(fails: str, counters: OwnCounters, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, before = FakeCuda(fails), num_mappings(counters)
    monkeypatch.setattr(cudart, "_check", cuda.check)
    location = msgspec.structs.replace(LOCATION, process=b"another", counters=counters.name)
    with pytest.raises(PeerGone, match=f"cannot map 1073741824 bytes of {counters.name}: {fails}"):
        PeerMemory(location, 4096, 0)
    assert (cuda.registered, cuda.opened, num_mappings(counters)) == (set(), set(), before)


def test_a_pool_of_this_process_on_another_device_leaves_nothing_behind(counters: OwnCounters, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, before = FakeCuda(), num_mappings(counters)
    monkeypatch.setattr(cudart, "_check", cuda.check)
    with pytest.raises(PeerGone, match="cuda:0 and cuda:1 of one process"):
        PeerMemory(msgspec.structs.replace(LOCATION, counters=counters.name), 4096, 1)
    assert (cuda.registered, cuda.opened, num_mappings(counters)) == (set(), set(), before)


@pytest.mark.parametrize("fails", ["", "cudaIpcCloseMemHandle", "cudaHostUnregister"])
def test_unmapping_goes_on_when_a_part_of_it_fails(fails: str, counters: OwnCounters, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, before = FakeCuda(fails), num_mappings(counters)
    monkeypatch.setattr(cudart, "_check", cuda.check)
    memory = PeerMemory(msgspec.structs.replace(LOCATION, process=b"another", counters=counters.name), 4096, 0)
    assert (memory.counters, memory.pool) == (0x1000, 0x2000)
    assert (len(cuda.registered), len(cuda.opened), num_mappings(counters)) == (1, 1, before + 1)
    with pytest.raises(cudart.CudaError, match=fails) if fails else nullcontext():
        memory.close()
    left = {"cudaIpcCloseMemHandle": (0, 1), "cudaHostUnregister": (1, 0), "": (0, 0)}
    assert (len(cuda.registered), len(cuda.opened)) == left[fails]
    assert num_mappings(counters) == before


def test_counters_are_shared_and_reset(counters: OwnCounters) -> None:
    peer = PeerCounters(counters.name)
    np.frombuffer(peer._memory, np.uint64)[7] = 2**40
    assert [counters.read(Imm(imm)) for imm in (6, 7, 8)] == [0, 2**40, 0]
    counters.reset(Imm(7))
    assert counters.read(Imm(7)) == 0
    assert peer.address % os.sysconf("SC_PAGE_SIZE") == 0
    peer.close()


def test_a_name_is_taken_once(counters: OwnCounters) -> None:
    cluster = counters.name.split("-")[1]
    with pytest.raises(ClusterError, match=r"32768 bytes of shared memory wanted: File exists"):
        OwnCounters(cluster, WorkerId("decode-0"), Epoch(1))
    assert PeerCounters(counters.name).address, "the first is unharmed"


def test_the_living_are_not_swept_and_the_dead_not_found() -> None:
    cluster = f"test{uuid4().hex[:8]}"
    own = OwnCounters(cluster, WorkerId("decode-0"), Epoch(1))
    assert sweep_orphans(cluster) == []
    (SHM / f"{own.name}.orphan").write_bytes(bytes(8 * NUM_IMMS))
    with pytest.raises(PeerGone, match="no longer lives"):
        PeerCounters(f"{own.name}.orphan")
    assert sweep_orphans(cluster) == [f"{own.name}.orphan"]
    own.close()
    with pytest.raises(PeerGone, match="No such file"):
        PeerCounters(own.name)


@pytest.mark.parametrize("name", ["../etc/passwd", "diptych-a/b", ""])
def test_a_name_that_is_none_of_ours_is_refused(name: str) -> None:
    with pytest.raises(PeerGone, match="no segment of ours"):
        PeerCounters(name)


@pytest.mark.parametrize("pages", [[3, 1, 2], range(5, 8), range(8, 5, -1), (9, 9, 9), array("q", [1, 2, 3])])
def test_page_ids_of_any_sequence(pages: Sequence[int]) -> None:
    slot = Slots(torch.device("cpu")).take(3)
    slot._times[:] = 5
    slot.fill(as_told(pages, 10, "here"), as_told([7, 8, 9], 10, "there"))
    assert slot.ids[:6].tolist() == [*pages, 7, 8, 9]
    assert not slot.has_ended


@pytest.mark.parametrize("count", [1, FEW_PAGES, FEW_PAGES + 1])
def test_lists_of_pages_are_told_as_arrays_are(count: int) -> None:
    pages, (slot, other) = list(range(count)), (Slots(torch.device("cpu")).take(count) for _ in range(2))
    slot.fill(as_told(pages, count, "here"), as_told(pages[::-1], count, "there"))
    other.fill(np.array(pages), np.array(pages[::-1]))
    assert slot.ids[: 2 * count].tolist() == other.ids[: 2 * count].tolist() == [*pages, *pages[::-1]]
    for wrong in ([*pages[1:], count], [*pages[1:], -1]):
        with pytest.raises(TransferError, match=f"pages .* to .*: there are {count} there"):
            as_told(wrong, count, "there")


def test_slots_are_used_again_and_never_twice_at_once() -> None:
    slots = Slots(torch.device("cpu"))
    taken = [slots.take(count) for count in (1, SMALLEST, SMALLEST + 1, 5000)] + [slots.take(1) for _ in range(40)]
    assert [slot.capacity for slot in taken[:4]] == [SMALLEST, SMALLEST, 2 * SMALLEST, 8192]
    assert len({address for slot in taken for address in (slot.ids_address, slot.scratch_address)}) == 2 * len(taken)
    assert slots.take_free(4097) is None
    slots.give_back(taken[3])
    assert slots.take_free(4097) is taken[3]


@pytest.mark.parametrize("pages", [[-1], [0, 10], [3, 2**40]])
def test_pages_outside_are_refused(pages: list[int]) -> None:
    with pytest.raises(TransferError, match="there are 10 there"):
        as_told(np.asarray(pages), 10, "there")


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1))
def test_runs_are_the_pages(pairs: list[tuple[int, int]]) -> None:
    here, there = np.array(pairs).T
    runs = list(zip(*(column.tolist() for column in runs_of(here, there)), strict=True))
    assert [(src + i, dst + i) for count, src, dst in runs for i in range(count)] == pairs
    for (count, src, dst), (_, next_src, next_dst) in pairwise(runs):
        assert (src + count, dst + count) != (next_src, next_dst), "two runs where one would do"


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5), st.integers(0, 5)), min_size=1), st.integers(1, 12))
def test_what_is_found_to_be_scattered_is_and_what_all_is_scattered_is_found(runs: list[tuple[int, int, int]], most_runs: int) -> None:
    here, there = (np.concatenate([1000 * run[side] + np.arange(run[0]) for run in runs]) for side in (1, 2))
    if are_scattered(here, there, most_runs):
        assert len(runs_of(here, there).lengths) > most_runs
    backwards = np.arange(4 * most_runs + 1)[::-1]
    assert are_scattered(backwards, backwards, most_runs)
    assert not are_scattered(backwards[::-1], backwards[::-1], most_runs)


# Writes under way

class FakeStream:
    """Runs what the test says it has run."""

    cuda_stream = 0

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls
        self.is_idle: bool | Exception = False

    def wait_event(self, event: object) -> None:
        self._calls.append("wait_event")

    def query(self) -> bool:
        if isinstance(self.is_idle, Exception):
            raise self.is_idle
        return self.is_idle


class Writes:
    """A transport with two lanes and no GPU; what a kernel would write, the test does. Times in µs after a time that fills 61 bits."""

    EPOCH_NS = 1_760_000_000_000_000_000

    def __init__(self) -> None:
        pytest.importorskip("triton")
        from diptych.kvtransfer.nvlink.transport import NvlinkTransport, _Lane

        self.transport = NvlinkTransport("c", WorkerId("w"), Epoch(1), torch.device("cuda", 0))
        self.transport._page_bytes, self.transport._num_pages = 4096, 100
        self.transport._slots = Slots(torch.device("cpu"))
        self.calls: list[str] = []
        self.streams = [FakeStream(self.calls), FakeStream(self.calls)]
        self.transport._lanes = [_Lane(stream, lambda *_: self.calls.append("push"), torch.zeros(1)) for stream in self.streams]
        self.transport._next_lane = cycle(self.transport._lanes)
        self.transport._ready = SimpleNamespace(record=lambda: self.calls.append("record"))
        self.closed: list[str] = []
        self.transport._current = nullcontext()

    def peer(self, name: str) -> Peer:
        from diptych.kvtransfer.nvlink.transport import _Target

        descriptor = msgspec.structs.replace(DESCRIPTOR, location=name.encode())
        memory = SimpleNamespace(pool=0, counters=0, close=lambda: self.closed.append(name))
        self.transport._targets[descriptor.location] = _Target(memory, 100)
        return Peer(descriptor)

    def start(self, lane: int, peer: Peer, imm: int, num_pages: int = 1) -> Slot:
        from diptych.kvtransfer.nvlink.transport import _Write

        slot, key = self.transport._slots.take(num_pages), (peer.descriptor.location, Imm(imm))
        slot.fill(np.arange(num_pages), np.arange(num_pages))
        self.transport._lanes[lane].writes.append(_Write(key, num_pages, slot))
        self.transport._num_pending[key] = self.transport._num_pending.get(key, 0) + 1
        return slot

    def tell(self, slot: Slot, began_us: float, ended_us: float | None = None) -> None:
        slot._times[0] = self.EPOCH_NS + int(1000 * began_us)
        if ended_us is not None:
            slot._times[1] = self.EPOCH_NS + int(1000 * ended_us)


def test_each_write_has_its_own_time_and_together_they_have_no_more_than_passed() -> None:
    writes = Writes()
    transport, a, b = writes.transport, writes.peer("a"), writes.peer("b")
    long, short = writes.start(0, a, 1, num_pages=5), writes.start(1, b, 2)
    writes.tell(short, 60, 60.3)
    assert (transport.settled(b, Imm(2)), transport.settled(a, Imm(1))) == (True, False)
    writes.tell(long, 0, 100)
    assert transport.busy_s(a, Imm(1)) == pytest.approx(100e-6)
    assert transport.busy_s(b, Imm(2)) == pytest.approx(0.3e-6)
    assert transport.stats.busy_s == pytest.approx(100e-6)
    assert (transport.stats.num_pages, transport.stats.num_bytes) == (6, 6 * 4096)
    first, second = writes.start(0, a, 1), writes.start(1, a, 1)
    writes.tell(first, 200, 300)
    writes.tell(second, 250, 350)
    assert transport.busy_s(a, Imm(1)) == pytest.approx(250e-6)
    assert transport.stop(a, Imm(1), 0.0)
    assert transport.busy_s(a, Imm(1)) == 0.0
    assert transport.stats.busy_s == pytest.approx(250e-6)


@pytest.mark.parametrize(
    ("engine", "lengths", "by_copies"),
    [
        ("either", [1024], True),                     # 4 MiB
        ("either", [1023], False),
        ("either", [2000, 48], True),                 # on average
        ("either", [1000, 1000], False),
        ("sm", [4096], False),
        ("copy", [1, 1], True),
    ],
)
def test_long_runs_are_for_copy_engines(engine: Any, lengths: list[int], by_copies: bool) -> None:
    writes = Writes()
    writes.transport._engine = engine
    pages = [5000 * i + page for i, length in enumerate(lengths) for page in range(length)]
    slot = writes.transport._slots.take(len(pages))
    slot.fill(np.array(pages), np.array(pages))
    runs = writes.transport._runs_to_copy(slot, len(pages))
    assert (None if runs is None else runs.lengths.tolist()) == (lengths if by_copies else None)


def test_a_write_waits_for_what_the_engine_has_queued() -> None:
    writes = Writes()
    writes.transport.write_pages(writes.peer("a"), [3], [4], Imm(1))
    assert writes.calls == ["record", "wait_event", "push"]


@given(st.permutations([(0, 10), (5, 20), (30, 40), (32, 35), (40, 41), (60, 61), (50, 70), (80, 80)]))
def test_busy_is_the_length_of_the_union_in_whatever_order_they_end(intervals: list[tuple[int, int]]) -> None:
    busy = BusyTime()
    for began, ended in intervals:
        busy.add(began, ended)
    assert busy.seconds == pytest.approx(1e-9 * (20 + 11 + 20))


def test_busy_remembers_no_more_gaps_than_it_may() -> None:
    busy = BusyTime()
    for start in range(0, 10_000, 10):
        busy.add(start, start + 5)
    assert (busy.seconds, len(busy._starts)) == (pytest.approx(5e-6), MAX_GAPS)
    busy.add(5, 8)                                    # long forgotten: it may have counted
    assert busy.seconds == pytest.approx(5e-6)
    busy.add(9_900, 9_950)
    assert busy.seconds == pytest.approx(5e-6 + 25e-9)


@pytest.mark.parametrize("looks", ["stats", "stop", "disconnect"])
def test_a_kernel_that_dies_without_a_word_is_noticed(looks: str) -> None:
    writes = Writes()
    peer = writes.peer("a")
    writes.start(0, peer, 1)
    look = {
        "stats": lambda: writes.transport.stats,
        "stop": lambda: writes.transport.stop(peer, Imm(1), 10.0),
        "disconnect": lambda: writes.transport.disconnect(peer),
    }[looks]
    writes.streams[0].is_idle = RuntimeError("an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        look()
    writes.streams[0].is_idle = True
    with pytest.raises(RuntimeError, match="a write of 1 pages is over and has not said so"):
        look()
    assert writes.closed == []


def test_nothing_is_unmapped_that_a_kernel_may_still_touch(monkeypatch: pytest.MonkeyPatch) -> None:
    writes = Writes()
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(transport_module(), "UNMAP_TIMEOUT_S", 0.01)
    leaving, staying = writes.peer("leaving"), writes.peer("staying")
    writes.streams[1].is_idle = True
    slot = writes.start(0, leaving, 1)
    with pytest.raises(RuntimeError, match="writes to a peer have not ended"):
        writes.transport.disconnect(leaving)
    writes.tell(slot, 0, 10)
    behind = writes.start(0, staying, 2)              # waits for the engine; whether the one before is quite over nobody knows
    with pytest.raises(RuntimeError, match="are not over"):
        writes.transport.disconnect(leaving)
    assert writes.closed == []
    writes.tell(behind, 11)
    writes.transport.disconnect(leaving)
    assert writes.closed == ["leaving"]


def transport_module() -> Any:
    from diptych.kvtransfer.nvlink import transport

    return transport
