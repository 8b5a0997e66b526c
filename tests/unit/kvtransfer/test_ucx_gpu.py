"""What the `ucx` shim does around a GPU's memory, with a CUDA driver of our own making: `released` says how far the stream has come."""

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from harness.ucx import needs_ucx
from harness.ucx_peer import UcxPeer, ucx_peer

from diptych.kvtransfer.transport import NUM_IMMS
from diptych.kvtransfer.ucx.build import find_compiler
from diptych.kvtransfer.ucx.shim import UID_BYTES, Link, Location, MemoryType, Shim
from diptych.kvtransfer.ucx.transport import PROTOCOL_VERSION
from diptych.messages.errors import ClusterError, PeerGone
from diptych.messages.ids import Imm

from .test_ucx import until

PAGE_BYTES, NUM_PAGES = 4096, 64
PAGES = np.arange(NUM_PAGES)
DRIVER = r"""
#include <stdlib.h>
#define INT __attribute__((visibility("default"))) volatile int
INT context = 1, released, looked, alive, recorded, query_error, ordering = 100, flush = 1, flush_error, flushed, entered;
int cuCtxGetCurrent(void **current) { *current = context ? (void *)&context : NULL; return 0; }
int cuCtxSetCurrent(void *current) { entered++; return current == (void *)&context ? 0 : 201; }
int cuCtxSynchronize(void) { return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 118 ? ordering : flush; return device; }
int cuEventCreate(void **event, unsigned flags) { alive++; *event = calloc(1, sizeof(int)); return flags == 2 ? 0 : 1; }
int cuEventRecord(void *event, void *stream) { *(int *)event = ++recorded; return stream == NULL ? 0 : 400; }
int cuEventQuery(void *event) { looked++; return query_error ? query_error : *(int *)event <= released ? 0 : 600; }
int cuEventDestroy_v2(void *event) { alive--; free(event); return 0; }
int cuFlushGPUDirectRDMAWrites(int target, int scope) { flushed++; return target == 0 && scope == 100 ? flush_error : 1; }
"""

pytestmark = needs_ucx


class Driver:
    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)

    def __getitem__(self, name: str) -> int:
        return ctypes.c_int.in_dll(self._library, name).value

    def __setitem__(self, name: str, value: int) -> None:
        ctypes.c_int.in_dll(self._library, name).value = value


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    source, library = tmp_path / "driver.c", tmp_path / "libdriver.so"
    source.write_text(DRIVER)
    subprocess.run([find_compiler(), "-shared", "-fPIC", "-o", str(library), str(source)], check=True, timeout=60)
    return Driver(library)


class OnGpu:
    """A shim whose pool, host memory in truth, is a GPU's to the driver."""

    def __init__(self, driver: Driver) -> None:
        self.memory = torch.arange(NUM_PAGES * PAGE_BYTES, dtype=torch.int64).to(torch.uint8)
        self.uid = bytes(UID_BYTES)
        self.shim = Shim(self.uid, NUM_IMMS, 5.0)
        try:
            self.shim.register(self.memory.data_ptr(), self.memory.nbytes, PAGE_BYTES, MemoryType.HOST, driver.path)
        except ClusterError:
            self.shim.close()
            raise
        self.shim.start()

    @property
    def location(self) -> Location:
        pool = (self.memory.data_ptr(), NUM_PAGES, MemoryType.HOST)
        return Location(PROTOCOL_VERSION, self.uid, *pool, True, self.shim.rkey, self.shim.address)


@pytest.fixture
def on_gpu(driver: Driver) -> Iterator[OnGpu]:
    made = OnGpu(driver)
    yield made
    made.shim.close()
    assert driver["alive"] == 0, "events are left"


@pytest.fixture(scope="module")
def receiver() -> Iterator[UcxPeer]:
    with ucx_peer(PAGE_BYTES, NUM_PAGES) as peer:
        yield peer


@pytest.fixture
def link(on_gpu: OnGpu, receiver: UcxPeer) -> Link:
    link = on_gpu.shim.link(msgspec.msgpack.decode(receiver.descriptor.location, type=Location))
    on_gpu.shim.await_open(link, 5.0)
    for imm in range(4):
        receiver.call("reset", imm)
    return link


def looked(driver: Driver) -> Callable[[], bool]:
    """It was looked at often since."""
    enough = driver["looked"] + 20
    return lambda: driver["looked"] >= enough


def test_pages_leave_once_the_stream_has_computed_them(driver: Driver, on_gpu: OnGpu, link: Link, receiver: UcxPeer) -> None:
    on_gpu.memory.zero_()
    for imm in (1, 2):
        on_gpu.shim.write(link, PAGES, PAGES, Imm(imm))
    until(looked(driver), 5.0)
    assert not on_gpu.shim.settled(link, Imm(1))
    assert receiver.call("num_landed", 1) == 0
    on_gpu.memory.fill_(7)
    driver["released"] = 1
    receiver.call("landed_at", 1, NUM_PAGES, 5.0)
    assert set(receiver.call("read")) == {7}
    until(looked(driver), 5.0)
    assert (receiver.call("num_landed", 2), on_gpu.shim.settled(link, Imm(2))) == (0, False)
    driver["released"] = 2
    receiver.call("landed_at", 2, NUM_PAGES, 5.0)
    until(lambda: on_gpu.shim.settled(link, Imm(2)) and driver["alive"] == 0, 5.0)
    assert driver["entered"] == 1, "UCX's thread has the pool's context"


def test_what_is_stopped_before_it_is_computed_never_leaves(driver: Driver, on_gpu: OnGpu, link: Link, receiver: UcxPeer) -> None:
    on_gpu.shim.write(link, PAGES, PAGES, Imm(1))
    until(looked(driver), 5.0)
    assert on_gpu.shim.stop(link, Imm(1), 5.0)
    driver["released"] = 2
    on_gpu.shim.write(link, PAGES, PAGES, Imm(2))
    receiver.call("landed_at", 2, NUM_PAGES, 5.0)
    assert receiver.call("num_landed", 1) == 0


def test_waiting_for_the_gpu_is_no_stall(driver: Driver, receiver: UcxPeer) -> None:
    shim = Shim(bytes(UID_BYTES), NUM_IMMS, 0.05)
    memory = torch.zeros(NUM_PAGES * PAGE_BYTES, dtype=torch.uint8)
    shim.register(memory.data_ptr(), memory.nbytes, PAGE_BYTES, MemoryType.HOST, driver.path)
    shim.start()
    link = shim.link(msgspec.msgpack.decode(receiver.descriptor.location, type=Location))
    shim.await_open(link, 5.0)
    receiver.call("reset", 1)
    shim.write(link, PAGES, PAGES, Imm(1))
    enough = driver["looked"] + 2000                          # at most one in 50 µs: longer than a stall
    until(lambda: driver["looked"] >= enough, 20.0)
    driver["released"] = 1
    receiver.call("landed_at", 1, NUM_PAGES, 5.0)
    shim.close()


def test_an_error_of_the_gpu_breaks_the_link(driver: Driver, on_gpu: OnGpu, link: Link, receiver: UcxPeer) -> None:
    driver["query_error"] = 719
    on_gpu.shim.write(link, PAGES, PAGES, Imm(1))

    def refused() -> bool:
        try:
            on_gpu.shim.write(link, PAGES, PAGES, Imm(1))
        except PeerGone as error:
            return "the GPU reports an error" in str(error)
        return False

    until(refused, 5.0)
    assert receiver.call("num_landed", 1) == 0


@pytest.mark.parametrize(("ordering", "flush_error", "shown"), [(0, 0, True), (0, 719, False), (100, 719, True)])
def test_what_a_nic_wrote_counts_once_kernels_see_it(driver: Driver, ordering: int, flush_error: int, shown: bool) -> None:
    """A GPU that orders such writes itself is not asked."""
    driver["ordering"], driver["flush_error"] = ordering, flush_error
    target, writer = OnGpu(driver), Shim(bytes(range(UID_BYTES)), NUM_IMMS, 0.5)
    writer.allocate(NUM_PAGES * PAGE_BYTES, PAGE_BYTES)
    writer.start()
    link = writer.link(target.location)
    writer.await_open(link, 5.0)
    writer.write(link, PAGES, PAGES, Imm(1))
    if shown:
        until(lambda: target.shim.num_landed(Imm(1)) == NUM_PAGES, 5.0)
    until(lambda: writer.settled(link, Imm(1)), 10.0)
    assert target.shim.num_landed(Imm(1)) == (NUM_PAGES if shown else 0)
    with nullcontext() if shown else pytest.raises(PeerGone):
        writer.write(link, PAGES, PAGES, Imm(1))
    writer.close()
    writer.release()
    target.shim.close()
    assert (driver["flushed"] > 0) is (ordering == 0)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [({"context": 0}, "no context is current"), ({"ordering": 0, "flush": 0}, "neither orders a NIC's writes")],
)
def test_a_gpu_that_cannot_be_used_is_said(driver: Driver, settings: dict[str, int], problem: str) -> None:
    for name, value in settings.items():
        driver[name] = value
    with pytest.raises(ClusterError, match=problem):
        OnGpu(driver)


def test_no_driver_is_said() -> None:
    memory = torch.zeros(PAGE_BYTES, dtype=torch.uint8)
    with closing(Shim(bytes(UID_BYTES), NUM_IMMS, 5.0)) as shim, pytest.raises(ClusterError, match="no_such_driver"):
        shim.register(memory.data_ptr(), memory.nbytes, PAGE_BYTES, MemoryType.HOST, "no_such_driver.so")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this UCX may well move GPU memory")
def test_a_ucx_without_cuda_is_said(driver: Driver) -> None:
    memory = torch.zeros(PAGE_BYTES, dtype=torch.uint8)
    with closing(Shim(bytes(UID_BYTES), NUM_IMMS, 5.0)) as shim, pytest.raises(ClusterError, match="does not move GPU memory"):
        shim.register(memory.data_ptr(), memory.nbytes, PAGE_BYTES, MemoryType.CUDA, driver.path)


def test_where_no_lane_puts_into_gpu_memory_there_is_no_link(on_gpu: OnGpu, receiver: UcxPeer) -> None:
    theirs = msgspec.msgpack.decode(receiver.descriptor.location, type=Location)
    link = on_gpu.shim.link(msgspec.structs.replace(theirs, memory_type=MemoryType.CUDA))

    def refused() -> bool:
        with pytest.raises(PeerGone) as caught:
            on_gpu.shim.await_open(link, 0.0)
        return "no lane puts into or out of GPU memory" in str(caught.value)

    until(refused, 5.0)
