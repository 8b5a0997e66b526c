"""Picks the worker that was sent the longest prefix of this prompt, unless it is loaded above its share.

    prompt ── chunks of block_size tokens, chained hashes ──► PrefixIndex ──► tokens matched per worker
                                                                               │ of the workers below the cap
                                                                               ▼
                                                              longest match, then least load

The cap is that of "Consistent Hashing with Bounded Loads" (Mirrokni, Thorup, Zadimoghaddam, 2016): nobody may hold more than
LOAD_FACTOR times the mean number of requests, the new one included.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from ...messages.requests import WorkerRef
from .pickers import LoadKey
from .policy import RoutingRequest, WorkerLoad

LOAD_FACTOR = 1.25
MAX_INDEXED_CHUNKS = 1 << 18


def chain(token_ids: tuple[int, ...], chunk_tokens: int) -> list[int]:
    """One hash per full chunk, each over all tokens up to its end. A collision costs a worse choice, never a wrong answer."""
    hashes: list[int] = []
    previous = 0
    for start in range(0, len(token_ids) - chunk_tokens + 1, chunk_tokens):
        previous = hash((previous, token_ids[start : start + chunk_tokens]))
        hashes.append(previous)
    return hashes


class PrefixIndex:
    """Which worker was sent which chunks; the least recently sent are forgotten first."""

    def __init__(self, max_chunks: int = MAX_INDEXED_CHUNKS) -> None:
        self._max_chunks = max_chunks
        self._holders: OrderedDict[int, set[WorkerRef]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def matched(self, hashes: Iterable[int], workers: Iterable[WorkerRef]) -> dict[WorkerRef, int]:
        """Leading chunks that each worker was sent."""
        depths = dict.fromkeys(workers, 0)
        still = set(depths)
        for depth, chunk in enumerate(hashes, start=1):
            still &= self._holders.get(chunk, set())
            if not still:
                break
            depths.update(dict.fromkeys(still, depth))
        return depths

    def holders(self, hashes: Iterable[int]) -> dict[WorkerRef, int]:
        """Leading chunks, of every worker that was sent any; those that were sent none are absent."""
        depths: dict[WorkerRef, int] = {}
        still: set[WorkerRef] | None = None
        for depth, chunk in enumerate(hashes, start=1):
            held = self._holders.get(chunk, set())
            still = held if still is None else still & held
            if not still:
                break
            depths.update(dict.fromkeys(still, depth))
        return depths

    def insert(self, hashes: Sequence[int], *workers: WorkerRef) -> None:
        for chunk in reversed(hashes):        # a prefix is more recent than what follows it, so it is forgotten later
            held = self._holders.get(chunk)
            if held is None:
                self._holders[chunk] = set(workers)
                continue
            for worker in workers:
                if worker not in held:        # in place of its earlier lives: a prefix that never gets old must not collect the dead
                    held.difference_update([other for other in held if other.worker_id == worker.worker_id])
                    held.add(worker)
            self._holders.move_to_end(chunk)
        while len(self._holders) > self._max_chunks:
            self._holders.popitem(last=False)


class PrefixAware:
    def __init__(self, load: LoadKey, index: PrefixIndex | None = None) -> None:
        self._load = load
        self._index = index or PrefixIndex()

    def pick(self, request: RoutingRequest, workers: Sequence[WorkerLoad]) -> WorkerLoad:
        hashes = chain(request.token_ids, workers[0].block_size)
        depths = self._index.matched(hashes, (worker.ref for worker in workers))
        cap = math.ceil(LOAD_FACTOR * (sum(worker.num_requests for worker in workers) + 1) / len(workers))
        below = [worker for worker in workers if worker.num_requests < cap]
        chosen = min(below, key=lambda worker: (-depths[worker.ref], self._load(worker)))
        self._index.insert(hashes, chosen.ref)
        return chosen
