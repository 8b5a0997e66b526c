"""Transport for GPUs of one host: the writer's GPU stores pages right into the receiver's pool, which is mapped by CUDA IPC.

    engine's stream    … layer group ──●── next layers …
                                       │ event
    one of the lanes                   └─► pages ═══ NVLink ═══► pool;  then the count ─── PCIe ──► receiver's host memory

The receiver's GPU and CPU do nothing; it reads its counters, which are host memory. A count is raised by a load and a store of the
writer's GPU: a counter has one writer at a time, and it stays right whenever the receiver resets it. What has been launched cannot be
called back, so `stop` waits for it; no call here waits for the GPU otherwise, except those that unmap.

Writes take the lanes in turn, three streams, so that one moves pages while others begin or end. That a write has ended, and
how long it took, it says itself, in memory of this host.

Deaths. A dead writer's GPU context ends with its process: nothing of it writes once the process is gone. A dead receiver's memory stays
valid for as long as a writer maps it: late writes land where nobody reads. A new life has a new handle and new counters.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from typing import Literal, NamedTuple

import torch

from ...kernels.page_push import DEFAULT_SHAPE, VECTOR_BYTES, WORD_BYTES, Counting, IdBuffers, PagePush, PushShape, Turns, push_pages
from ...messages.errors import ClusterError, PeerGone, TransferError
from ...messages.ids import Epoch, Imm, WorkerId
from ...messages.membership import MemoryDescriptor
from ..layout import KVLayout
from ..shm import host_identity, sweep_orphans
from ..transport import NUM_IMMS, KVPool, PageIds, Peer, TransferStats
from . import cudart
from .busy import BusyTime
from .counters import OwnCounters
from .memory import THIS_PROCESS, VERSION, DeviceMemory, Location, PeerMemory, check_page_bytes, location_here
from .pages import FIRST_TIMES, Runs, Slot, Slots, are_scattered, as_told, runs_of

POLL_S = 2e-5
UNMAP_TIMEOUT_S = 30.0
NUM_LANES = 3
COPY_RUN_BYTES = 4 << 20
"""From this mean length on, runs of neighbouring pages go by copy engines, which leave all SMs to the prefill. Chosen, not swept: 128 MiB
in runs of 1 MiB were counted 0.3 ms later than by SMs. Less than this in all is not looked at for runs: a page waits for the host."""

HIGH_PRIORITY = -1
"""Of the lanes: their programs get the next SM that is free, where at the engine's own priority they would queue behind all
programs of the kernel that is running, and pages would leave only between kernels."""

Key = tuple[bytes, Imm]


class _Write(NamedTuple):
    key: Key
    num_pages: int
    slot: Slot


@dataclass(frozen=True)
class _Lane:
    stream: torch.cuda.Stream
    push: PagePush
    arrived: torch.Tensor                 # of which `push` has the address alone
    writes: deque[_Write] = field(default_factory=deque)            # in the order of their start, in which they end


@dataclass(frozen=True)
class _Target:
    memory: PeerMemory
    num_pages: int


class NvlinkTransport:
    """For one thread. `engine` says what moves pages: SMs ("sm"), copy engines ("copy"), or, by the length of their runs, either."""

    name = "nvlink"
    gathers = True                        # an NVLink that is awake takes power, which a prefill at its GPU's limit lacks
    overlaps = True

    def __init__(
        self, cluster: str, worker_id: WorkerId, epoch: Epoch, device: torch.device,
        engine: Literal["sm", "copy", "either"] = "either", shape: PushShape = DEFAULT_SHAPE,
    ) -> None:  # fmt: skip
        self._names = (cluster, worker_id, epoch)
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._engine, self._shape = engine, shape
        self._own: DeviceMemory | None = None
        self._counters: OwnCounters | None = None
        self._targets: dict[bytes, _Target] = {}
        self._lanes: list[_Lane] = []
        self._num_pending: dict[Key, int] = {}
        self._busy: defaultdict[Key, BusyTime] = defaultdict(BusyTime)
        self._all_busy = BusyTime()
        self._num_pages_moved = self._num_bytes_moved = 0

    # the receiver's side

    def allocate(self, layout: KVLayout, num_blocks: int) -> KVPool:
        if layout.piece_bytes % VECTOR_BYTES:
            raise ClusterError(f"transport nvlink moves pages of whole {VECTOR_BYTES} bytes, not of {layout.piece_bytes}")
        sweep_orphans(self._names[0])
        pool_bytes = num_blocks * layout.rank_block_bytes
        with torch.cuda.device(self._device):
            self._own = DeviceMemory(pool_bytes)
            self._counters = OwnCounters(*self._names)
            memory = self._own.tensor(self._device)[:pool_bytes].zero_()
            self._words = memory.view(torch.int64)
            self._page_bytes, self._num_pages = layout.piece_bytes, pool_bytes // layout.piece_bytes
            self._prepare_writing()
        return KVPool(layout, memory.view(layout.dtype).view(layout.shape(num_blocks)))

    def _prepare_writing(self) -> None:
        """All that takes long the first time: streams, pinned memory, the kernel's compilation."""
        page_words = self._page_bytes // WORD_BYTES
        self._slots = Slots(self._device)
        lock, finished, *all_arrived = (torch.zeros(1, dtype=torch.int32, device=self._device) for _ in range(2 + NUM_LANES))
        num_sms = torch.cuda.get_device_properties(self._device).multi_processor_count
        self._lock, turns = lock, Turns(finished, has_room=self._shape.fit(NUM_LANES, num_sms))
        nowhere, slot = torch.zeros(1, dtype=torch.int64, device=self._device), self._slots.take(0)
        ids, scratch, times = slot.buffers
        counting = Counting(nowhere, 0, 0, all_arrived[0], lock, turns, times)
        compiled = push_pages(self._words, self._words, IdBuffers(ids, scratch), 0, page_words, counting, self._shape)
        torch.cuda.synchronize(self._device)            # what lanes use is there
        self._slots.give_back(slot)
        for arrived in all_arrived:
            stream = torch.cuda.Stream(self._device, priority=HIGH_PRIORITY)  # type: ignore[no-untyped-call]
            push = PagePush(compiled, self._words, page_words, arrived, lock, turns, self._shape)
            self._lanes.append(_Lane(stream, push, arrived))
        self._next_lane = cycle(self._lanes)
        self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._current = torch.cuda.device(self._device)

    def adopt(self, pool: KVPool) -> None:
        raise ClusterError("transport nvlink needs a pool of its own: only whole allocations have an IPC handle")

    def fence(self, writer: MemoryDescriptor, timeout_s: float) -> bool:
        """A process's GPU context ends with it, so nothing of a dead one is under way."""
        return True

    def register(self, pool: KVPool) -> MemoryDescriptor:
        assert self._own is not None
        assert self._counters is not None
        assert self._device.index is not None
        with torch.cuda.device(self._device):
            handle = cudart.ipc_handle(self._own.address)
        where = (self._own.address, self._device.index, self._own.num_bytes, self._counters.name)
        return MemoryDescriptor(
            transport=self.name,
            host=host_identity(),
            location=Location(VERSION, THIS_PROCESS, handle, *where).pack(),
            num_pages=self._num_pages,
            page_bytes=self._page_bytes,
            num_imms=NUM_IMMS,
        )

    def num_landed(self, imm: Imm) -> int:
        assert self._counters is not None
        return self._counters.read(imm)

    def reset(self, imm: Imm) -> None:
        assert self._counters is not None
        self._counters.reset(imm)

    # the writer's side

    def connect(self, descriptor: MemoryDescriptor) -> Peer:
        check_page_bytes(descriptor, self._page_bytes)
        if descriptor.location not in self._targets:        # or each handoff would look at the file system for the host's name
            location = location_here(descriptor)
            assert self._device.index is not None
            with torch.cuda.device(self._device):
                memory = PeerMemory(location, descriptor.num_pages * self._page_bytes, self._device.index)
            self._targets[descriptor.location] = _Target(memory, descriptor.num_pages)
        return Peer(descriptor)

    def disconnect(self, peer: Peer) -> None:
        """Raises RuntimeError if the writes do not end in UNMAP_TIMEOUT_S: the GPU hangs, and the process must not go on."""
        if peer.descriptor.location in self._targets:
            self._unmap(peer.descriptor.location)

    def _unmap(self, location: bytes) -> None:
        if not self._poll_until(lambda: all(key[0] != location for key in self._num_pending), UNMAP_TIMEOUT_S):
            raise RuntimeError(f"writes to a peer have not ended in {UNMAP_TIMEOUT_S} s")
        if not self._poll_until(lambda: all(map(_has_moved_on, self._lanes)), UNMAP_TIMEOUT_S):
            raise RuntimeError(f"the kernels that wrote to a peer are not over after {UNMAP_TIMEOUT_S} s")
        target = self._targets.pop(location)
        for key in [key for key in self._busy if key[0] == location]:
            del self._busy[key]
        with torch.cuda.device(self._device):
            target.memory.close()

    def write_pages(self, peer: Peer, src_pages: PageIds, dst_pages: PageIds, imm: Imm) -> None:
        target = self._targets.get(peer.descriptor.location)
        if target is None:
            raise PeerGone(f"the peer of {len(dst_pages)} pages for counter {imm} is not connected")
        if len(src_pages) != len(dst_pages) or not 0 <= imm < NUM_IMMS:
            raise TransferError(f"{len(src_pages)} pages to {len(dst_pages)} places, counter {imm} of {NUM_IMMS}")
        if not len(src_pages):
            return
        here, there = as_told(src_pages, self._num_pages, "here"), as_told(dst_pages, target.num_pages, "there")
        slot = self._slots.take_free(len(src_pages))
        if slot is None:                                # otherwise what has ended is looked for when somebody asks
            self._settle()
            slot = self._slots.take(len(src_pages))
        slot.fill(here, there)
        self._start(target, slot, len(src_pages), (peer.descriptor.location, imm))

    def stop(self, peer: Peer, imm: Imm, timeout_s: float) -> bool:
        key = (peer.descriptor.location, imm)
        stopped = self._poll_until(lambda: key not in self._num_pending, timeout_s)
        if stopped:
            self._busy.pop(key, None)
        return stopped

    def settled(self, peer: Peer, imm: Imm) -> bool:
        self._settle()
        return (peer.descriptor.location, imm) not in self._num_pending

    def busy_s(self, peer: Peer, imm: Imm) -> float:
        self._settle()
        key = (peer.descriptor.location, imm)
        return self._busy[key].seconds if key in self._busy else 0.0

    @property
    def stats(self) -> TransferStats:
        """Raises torch's error if the GPU reports one, as `stop` and `disconnect` do: a kernel that has died says nothing."""
        self._settle()
        self._require_life()
        return TransferStats(self._num_pages_moved, self._num_bytes_moved, self._all_busy.seconds)

    def close(self) -> None:
        """The pool's memory goes with its last tensor."""
        for location in list(self._targets):
            self._unmap(location)
        if self._counters is not None:
            self._counters.close()
            self._counters = None
        if self._own is not None:
            del self._words
            self._own = None

    # the lanes

    def _start(self, target: _Target, slot: Slot, num_pages: int, key: Key) -> None:
        """The host's part of a page's latency: nothing that can be done before or after is done here."""
        lane = next(self._next_lane)
        stream, counters = lane.stream.cuda_stream, target.memory.counters
        addresses = target.memory.pool, slot.ids_address, slot.scratch_address
        with self._current:
            self._ready.record()
            lane.stream.wait_event(self._ready)
            by_kernel = num_pages
            if (runs := self._runs_to_copy(slot, num_pages)) is not None:
                lane.push(*addresses, 0, counters, key[1], 0, slot.times_address + FIRST_TIMES, stream)
                self._copy(target.memory.pool, runs, stream)
                by_kernel = 0
            lane.push(*addresses, by_kernel, counters, key[1], num_pages, slot.times_address, stream)
        lane.writes.append(_Write(key, num_pages, slot))
        self._num_pending[key] = self._num_pending.get(key, 0) + 1

    def _runs_to_copy(self, slot: Slot, num_pages: int) -> Runs | None:
        """None: SMs move them."""
        num_bytes = num_pages * self._page_bytes
        if self._engine == "sm" or (self._engine == "either" and num_bytes < COPY_RUN_BYTES):
            return None
        here, there, most_runs = slot.ids[:num_pages], slot.ids[num_pages : 2 * num_pages], num_bytes // COPY_RUN_BYTES
        if self._engine == "either" and are_scattered(here, there, most_runs):
            return None
        runs = runs_of(here, there)
        return runs if self._engine == "copy" or len(runs.lengths) <= most_runs else None

    def _copy(self, target: int, runs: Runs, stream: int) -> None:
        lengths, here, there = runs
        sources = (self._words.data_ptr() + here * self._page_bytes).tolist()
        targets = (target + there * self._page_bytes).tolist()
        cudart.copy_all(targets, sources, (lengths * self._page_bytes).tolist(), stream)

    def _settle(self) -> None:
        """Accounts for what has ended, in the order of their ends."""
        while ended := [lane.writes for lane in self._lanes if lane.writes and lane.writes[0].slot.has_ended]:
            self._account(min(ended, key=lambda writes: writes[0].slot.times_ns[1]).popleft())

    def _account(self, write: _Write) -> None:
        times_ns = write.slot.times_ns
        self._busy[write.key].add(*times_ns)
        self._all_busy.add(*times_ns)
        self._num_pages_moved += write.num_pages
        self._num_bytes_moved += write.num_pages * self._page_bytes
        self._num_pending[write.key] -= 1
        if not self._num_pending[write.key]:
            del self._num_pending[write.key]
        self._slots.give_back(write.slot)

    def _require_life(self) -> None:
        """Raises torch's error, and RuntimeError for a kernel that has gone without a word."""
        for lane in self._lanes:
            if lane.writes and lane.stream.query() and not lane.writes[-1].slot.has_ended:
                raise RuntimeError(f"a write of {lane.writes[-1].num_pages} pages is over and has not said so")

    def _poll_until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        give_up_at = time.monotonic() + timeout_s
        while True:
            self._settle()
            if condition():
                return True
            self._require_life()
            if time.monotonic() >= give_up_at:
                return False
            time.sleep(POLL_S)


def _has_moved_on(lane: _Lane) -> bool:
    """From all writes that have ended: a kernel's threads go on for some microseconds after the one that says so, and may touch what
    is to be unmapped. It is over once the stream is, or the next one has begun."""
    return lane.stream.query() or bool(lane.writes and lane.writes[0].slot.times_ns[0])
