"""Picks the worker that was sent the longest prefix of this prompt, unless it is loaded above its share.

    prompt ── chunks of block_size tokens, chained hashes ──► PrefixIndex ──► tokens matched per worker
                                                                               │ of the workers below the cap
                                                                               ▼
                                                              longest match, then least load

The cap is that of "Consistent Hashing with Bounded Loads" (Mirrokni, Thorup, Zadimoghaddam, 2016): nobody may hold more than
LOAD_FACTOR times the mean number of requests, the new one included.
"""

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from ...messages.ids import WorkerId
from ...messages.requests import WorkerRef
from .pickers import LoadKey
from .policy import RoutingRequest, WorkerLoad

LOAD_FACTOR = 1.25
MAX_INDEXED_CHUNKS = 1 << 18
MAX_LIVES = 1024
"""Of workers, each a bit in every set: with more than so many the index begins anew."""


def chain(token_ids: tuple[int, ...], chunk_tokens: int) -> list[int]:
    """One hash per full chunk, each over all tokens up to its end. A collision costs a worse choice, never a wrong answer."""
    hashes: list[int] = []
    previous = 0
    for start in range(0, len(token_ids) - chunk_tokens + 1, chunk_tokens):
        previous = hash((previous, token_ids[start : start + chunk_tokens]))
        hashes.append(previous)
    return hashes


class Held:
    """Who was sent how much of one prompt."""

    def __init__(self, levels: list[int], bits: Mapping[WorkerRef, int]) -> None:
        self._levels = levels                 # who was sent the first chunk, the first two, …: each a subset of the one before
        self._bits = bits
        self.most = len(levels)               # leading chunks that somebody was sent, who may be gone
        self._hold_any, self._hold_most = (levels[0], levels[-1]) if levels else (0, 0)

    def depth(self, worker: WorkerRef) -> int:
        """Leading chunks."""
        bits = self._bits.get(worker, 0)
        if bits & self._hold_most:                               # of prompts that all begin alike, most workers do
            return self.most
        return bisect_left(self._levels, True, key=lambda level: not level & bits) if bits & self._hold_any else 0

    def deepest(self, workers: Sequence[WorkerLoad], limit: float = math.inf) -> WorkerLoad | None:
        """Of those with fewer requests than `limit` that were sent most of it the first; None: they were sent nothing."""
        deepest, depth, bits_of = None, 0, self._bits.get
        deeper = self._hold_any
        for worker in workers:
            if bits_of(worker.ref, 0) & deeper and worker.num_requests < limit:
                deepest, depth = worker, self.depth(worker.ref)
                if depth == self.most:
                    break
                deeper = self._levels[depth]
        return deepest


class PrefixIndex:
    """Which worker was sent which chunks; the least recently sent are forgotten first. A set of workers is a number with one bit for each
    life: as sets of objects, those of a system prompt that every worker holds would take more time than all else of a decision."""

    def __init__(self, max_chunks: int = MAX_INDEXED_CHUNKS) -> None:
        self._max_chunks = max_chunks
        self._holders: OrderedDict[int, int] = OrderedDict()
        self._bits: dict[WorkerRef, int] = {}
        self._lives: dict[WorkerId, int] = {}     # bits of all lives of a worker

    def __len__(self) -> int:
        return len(self._holders)

    def held(self, hashes: Iterable[int]) -> Held:
        levels: list[int] = []
        holders, still = self._holders, -1
        for chunk in hashes:
            still &= holders.get(chunk, 0)
            if not still:
                break
            levels.append(still)
        return Held(levels, self._bits)

    def insert(self, hashes: Sequence[int], *workers: WorkerRef) -> None:
        """In place of their earlier lives: a prefix that never gets old must not collect the dead."""
        if len(self._bits) + len(workers) > MAX_LIVES and not self._bits.keys() >= set(workers):
            for known in (self._holders, self._bits, self._lives):
                known.clear()
        new = others = 0
        for worker in workers:
            bit = self._bits.setdefault(worker, 1 << len(self._bits))
            lives = self._lives[worker.worker_id] = self._lives.get(worker.worker_id, 0) | bit
            new, others = new | bit, others | lives
        holders = self._holders
        for chunk in reversed(hashes):        # a prefix is more recent than what follows it, so it is forgotten later
            held = holders.get(chunk)
            if held is None:
                holders[chunk] = new
                continue
            if held & others != new:          # else only its age changes
                holders[chunk] = held & ~others | new
            holders.move_to_end(chunk)
        while len(holders) > self._max_chunks:
            holders.popitem(last=False)


class PrefixAware:
    def __init__(self, load: LoadKey, index: PrefixIndex | None = None) -> None:
        self._load = load
        self._index = index or PrefixIndex()

    def pick(self, request: RoutingRequest, workers: Sequence[WorkerLoad]) -> WorkerLoad:
        hashes = chain(request.token_ids, workers[0].block_size)
        held = self._index.held(hashes)
        cap = math.ceil(LOAD_FACTOR * (sum(worker.num_requests for worker in workers) + 1) / len(workers))
        below = [worker for worker in workers if worker.num_requests < cap]
        chosen = min(below, key=lambda worker: (-held.depth(worker.ref), self._load(worker)))
        self._index.insert(hashes, chosen.ref)
        return chosen
