"""NIXL's column: the same pages by its prepared WRITE (UCX), until its notification is seen at the receiver.

Preparing a request is not counted, which is to its advantage: a page list here is new in every call.
"""

import os
import time
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from ...kvtransfer.transport import IdArray
from .errors import TransferBenchError
from .transfer_peer import COUNT_TIMEOUT_S, Path, Written

PACKAGES = ("nixl_cu13", "nixl_cu12")
FEW_CORES = 4
LOOK_S = 1e-4 if (os.cpu_count() or 1) < FEW_CORES else 0.0       # NIXL's own threads spin: ours must not take their cores

Descriptor = tuple[bytes, list[tuple[int, int, int]]]           # the agent's metadata, (address, bytes, device) of each page


def is_installed() -> bool:
    return any(find_spec(name) for name in PACKAGES)


class NixlEnd:
    def __init__(self, path: Path, name: str) -> None:
        module = import_module(next(package for package in PACKAGES if find_spec(package)))
        self._device = torch.device(path.device)
        self._memory = "DRAM" if self._device.type == "cpu" else "VRAM"
        self._module, self._name = module, name
        self._num_opened = 0
        self._agent: Any = None
        self._pool: torch.Tensor | None = None
        self._requests: list[Any] = []
        self._prepared: list[Any] = []

    def open(self, page_bytes: int, num_pages: int) -> Descriptor:
        self.close()
        self._num_opened += 1
        self._agent = self._module.nixl_agent(f"{self._name}-{self._num_opened}")
        self._pool = pool = torch.zeros(page_bytes * num_pages, dtype=torch.uint8, device=self._device)
        self._registered = self._agent.register_memory(pool)
        self._pages = [(pool.data_ptr() + i * page_bytes, page_bytes, 0) for i in range(num_pages)]
        self._num_pages, self._num_counted = num_pages, 0
        return self._agent.get_agent_metadata(), self._pages

    def connect(self, descriptor: Descriptor) -> None:
        metadata, pages = descriptor
        remote = self._agent.add_remote_agent(metadata)
        self._here = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", self._pages, self._memory)
        self._there = self._agent.prep_xfer_dlist(remote, pages, self._memory)

    def prepare(self, src: IdArray, dst: IdArray) -> None:
        self._src, self._dst = src.tolist(), dst.tolist()
        self._prepared = [self._request()]

    def _request(self) -> Any:
        word = str(len(self._src)).encode()
        return self._agent.make_prepped_xfer("WRITE", self._here, self._src, self._there, self._dst, word)

    def write(self, num_times: int) -> Written:
        requests = [*self._prepared, *(self._request() for _ in range(num_times - len(self._prepared)))]
        self._prepared = []
        started_s = time.monotonic()
        for request in requests:
            self._check(self._agent.transfer(request))
        returned_s = time.monotonic()
        self._requests += requests
        self._wait()                                            # NIXL moves pages only while it is asked how far it is
        return Written(started_s, returned_s)

    def _wait(self) -> None:
        give_up_at = time.monotonic() + COUNT_TIMEOUT_S
        while not all(self._check(self._agent.check_xfer_state(request)) for request in self._requests):
            time.sleep(LOOK_S)
            if time.monotonic() > give_up_at:
                raise TransferBenchError(f"NIXL's writes have not ended in {COUNT_TIMEOUT_S} s")

    def _check(self, state: str) -> bool:
        if state not in ("PROC", "DONE"):
            raise TransferBenchError(f"NIXL's write is in state {state}")
        return state == "DONE"

    def stop(self) -> float:
        """NIXL keeps no account of its own."""
        self._wait()
        for request in self._requests:
            self._agent.release_xfer_handle(request)
        self._requests = []
        self._prepared = [self._request()]
        return 0.0

    def reset(self) -> None:
        self._num_counted = 0

    def counted_at(self, num_pages: int) -> float:
        give_up_at = time.monotonic() + COUNT_TIMEOUT_S
        while self._num_counted < num_pages:
            for words in self._agent.get_new_notifs().values():
                self._num_counted += sum(int(word) for word in words)
            time.sleep(LOOK_S)
            if time.monotonic() > give_up_at:
                raise TransferBenchError(f"{self._num_counted} of {num_pages} pages over NIXL after {COUNT_TIMEOUT_S} s")
        return time.monotonic()

    def close(self) -> None:
        if self._agent is not None:
            for request in self._prepared:
                self._agent.release_xfer_handle(request)
            self._prepared = []
            self._agent.deregister_memory(self._registered)
            self._agent = self._pool = None
