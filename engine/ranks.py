"""The ranks of one worker: the same work in all of them at the same time, each in a thread of its own. Rank 0's is the caller's.

    run(work):  rank 0 ─ work(0) ───────┐
                rank 1 ─ work(1) ───────┴─► results, in the order of the ranks

Ranks wait for each other in what they compute, so one that fails leaves the others waiting: `on_failure` ends that.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any, TypeVar

import torch

ABORT_S = 10.0                  # so long the others may take to end, once a rank has failed

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Ranks:
    """`devices`: of each rank. `on_failure` is told which rank has failed, in that rank's thread."""

    def __init__(self, devices: Sequence[torch.device], on_failure: Callable[[int], None] = lambda rank: None) -> None:
        self.devices = tuple(devices)
        self._on_failure = on_failure
        self._jobs = [queue.SimpleQueue[Callable[[], None] | None]() for _ in self.devices[1:]]
        self._together = threading.Barrier(len(self.devices))
        self._agreed: Any = None
        self._failure: BaseException | None = None            # the first one; it stays
        num_threads = torch.get_num_threads()
        for device, jobs in zip(self.devices[1:], self._jobs, strict=True):
            threading.Thread(target=_serve, args=(device, num_threads, jobs), name=f"rank on {device}", daemon=True).start()

    def __len__(self) -> int:
        return len(self.devices)

    @property
    def has_failed(self) -> bool:
        return self._failure is not None

    def run(self, work: Callable[[int], T]) -> list[T]:
        """Raises what the first rank that failed has raised. Waits as long as the slowest takes: that a worker's loop stands still is seen
        from outside (`timeouts: stall_s`)."""
        others: list[Future[T]] = []
        for rank, jobs in enumerate(self._jobs, 1):
            future: Future[T] = Future()
            others.append(future)
            jobs.put(lambda rank=rank, future=future: self._attempt(work, rank, future))    # type: ignore[misc]
        own: Future[T] = Future()
        self._attempt(work, 0, own)
        wait(others, return_when=FIRST_EXCEPTION)
        if self._failure is not None:
            wait(others, ABORT_S)
            raise self._failure
        return [future.result() for future in (own, *others)]

    def close(self) -> None:
        """Ends the threads."""
        for jobs in self._jobs:
            jobs.put(None)

    def agree(self, rank: int, value: T) -> T:
        """What rank 0 brings, in all ranks: for a choice that each would make from measurements of its own. All must ask."""
        if rank == 0:
            self._agreed = value
        self._together.wait()
        agreed: T = self._agreed
        self._together.wait()
        return agreed

    def _attempt(self, work: Callable[[int], T], rank: int, future: Future[T]) -> None:
        try:
            future.set_result(work(rank))
        except BaseException as error:
            logger.error("rank %d of %d has failed: %r", rank, len(self), error)      # rank 0 may wait for it on its GPU, and tell nobody
            if self._failure is None:
                self._failure = error
            self._together.abort()
            try:
                self._on_failure(rank)
            finally:
                future.set_exception(error)


def _serve(device: torch.device, num_threads: int, jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    torch.set_num_threads(num_threads)                         # counts for this thread alone
    if device.type == "cuda":
        torch.cuda.set_device(device)
    while job := jobs.get():
        job()
