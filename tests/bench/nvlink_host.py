"""The host's part of `write_pages` on the transport `nvlink`, with CUDA faked: what Python itself takes. No GPU needed.

    python tests/bench/nvlink_host.py [--profile]

The kernel is compiled for sm_90 as always and its launch ends in nothing, as every CUDA call does: a real call adds what the driver takes.
"hot": one call after the other.  "after 2 ms": with such a pause before each, as between the layer groups of a prefill. Medians, µs.
"""

import argparse
import cProfile
import pstats
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from diptych.kvtransfer.layout import KVLayout
from diptych.kvtransfer.nvlink import transport as nvlink
from diptych.kvtransfer.nvlink.pages import Slot
from diptych.kvtransfer.transport import Peer
from diptych.messages.ids import Epoch, Imm, WorkerId
from diptych.messages.membership import MemoryDescriptor

PAGE_BYTES, NUM_PAGES = 4096, 4096
HOPPER = GPUTarget("cuda", 90, 32)
ADDRESS = 1 << 40
PEER = Peer(MemoryDescriptor("nvlink", "", b"peer", NUM_PAGES, PAGE_BYTES, 4096))


class Nothing:
    """An event, a stream, a context, a launch: everything is over at once."""

    cuda_stream = 0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __call__(self, *_: object) -> None:
        return None

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None

    record = wait_event = __call__

    def query(self) -> bool:
        return True


class Memory:
    def __init__(self, num_bytes: int) -> None:
        self.num_bytes, self.address = num_bytes, ADDRESS

    def tensor(self, _: torch.device) -> torch.Tensor:
        return torch.zeros(self.num_bytes, dtype=torch.uint8)


def fake_driver() -> Any:
    properties = {"max_shared_mem": 232_448, "multiprocessor_count": 132}
    utils = SimpleNamespace(get_device_properties=lambda _: properties, load_binary=lambda *_: (1, 2, 32, 0, 1024))
    return SimpleNamespace(
        launcher_cls=Nothing, utils=utils, get_current_device=lambda: 0, get_current_stream=lambda _: 0, get_current_target=lambda: HOPPER
    )


@contextmanager
def transport() -> Iterator[nvlink.NvlinkTransport]:
    driver.set_active(fake_driver())
    with ExitStack() as fakes:
        for name in ("Event", "Stream", "device", "stream"):
            fakes.enter_context(patch.object(torch.cuda, name, Nothing))
        for name in ("synchronize", "empty_cache"):
            fakes.enter_context(patch.object(torch.cuda, name, Nothing()))
        fakes.enter_context(patch.object(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132)))
        fakes.enter_context(patch.object(nvlink, "DeviceMemory", Memory))
        fakes.enter_context(patch.object(Slot, "has_ended", True))
        made = nvlink.NvlinkTransport(f"bench{uuid4().hex[:8]}", WorkerId("writer"), Epoch(1), torch.device("cuda", 0))
        made._device = torch.device("cpu")
        made.allocate(KVLayout("bytes", torch.uint8, 1, 1, PAGE_BYTES // 32, 16), NUM_PAGES)
        memory: Any = SimpleNamespace(pool=2 * ADDRESS, counters=3 * ADDRESS, close=lambda: None)
        made._targets[PEER.descriptor.location] = nvlink._Target(memory, NUM_PAGES)
        yield made
        made.close()


def median_us(once: Callable[[], object], num_times: int, pause_s: float) -> float:
    times = []
    for _ in range(num_times):
        if pause_s:
            time.sleep(pause_s)
        started = time.perf_counter()
        once()
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--profile", action="store_true", help="of calls with one page")
    arguments = parser.parse_args()
    with transport() as made:
        print(f"{'pages':>6} {'ids as':>8} {'hot':>8} {'after 2 ms':>12}")
        for count in (1, 64, 512, 2048, 4096):
            ids = [random.sample(range(NUM_PAGES), count) for _ in range(2)]
            for name, (src, dst) in {"arrays": [np.array(side) for side in ids], "lists": ids}.items():
                once = lambda src=src, dst=dst: made.write_pages(PEER, src, dst, Imm(0))      # noqa: E731
                median_us(once, 50, 0.0)
                print(f"{count:>6} {name:>8} {median_us(once, 500, 0.0):>8.1f} {median_us(once, 100, 2e-3):>12.1f}", flush=True)
        if arguments.profile:
            with cProfile.Profile() as profile:
                for _ in range(5000):
                    made.write_pages(PEER, [1], [2], Imm(0))
            pstats.Stats(profile).sort_stats("tottime").print_stats(15)


if __name__ == "__main__":
    main()
