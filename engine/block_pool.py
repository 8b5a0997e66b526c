"""KV blocks of one worker and who holds them, with the prefix cache: pure bookkeeping, no memory is touched.

              take                         release, not published
    free ───────────────► held (refs ≥ 1) ───────────────────────► free
                           ▲   │ release, published
            take by hash   │   ▼
                         cached (refs = 0, hash known) ── evicted, least recently released first ──► free

At all times free + cached + held = total.
"""

import hashlib
import struct
from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from itertools import chain

from ..messages.ids import BlockHash, BlockId


def chain_hashes(token_ids: Sequence[int], block_size: int, known: Sequence[BlockHash] = ()) -> list[BlockHash]:
    """Hashes of all full blocks of `token_ids`; `known` are the first ones, not computed again."""
    hashes, pack = list(known), struct.Struct(f"<{block_size}q").pack
    for index in range(len(hashes), len(token_ids) // block_size):
        before = hashes[-1] if hashes else b""
        block = pack(*token_ids[index * block_size : (index + 1) * block_size])
        hashes.append(BlockHash(hashlib.blake2b(before + block, digest_size=16).digest()))
    return hashes


class BlockPool:
    def __init__(self, num_blocks: int, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self._prefix_cache = prefix_cache
        self._free: deque[BlockId] = deque(BlockId(i) for i in range(num_blocks))
        self._cached: OrderedDict[BlockId, None] = OrderedDict()      # least recently released first
        self._refs: dict[BlockId, int] = {}
        self._by_hash: dict[BlockHash, BlockId] = {}
        self._hash_of: dict[BlockId, BlockHash] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return len(self._refs)

    @property
    def num_available(self) -> int:
        """Blocks that `take` could give: free ones, and cached ones by evicting them."""
        return len(self._free) + len(self._cached)

    def num_private(self, blocks: Sequence[BlockId]) -> int:
        """Of one holder's blocks, those that nobody else holds: all after the prefix that it shares."""
        refs = self._refs
        return len(blocks) - bisect_left(blocks, True, key=lambda block: refs[block] == 1)

    def num_freed_by(self, holders: Iterable[Sequence[BlockId]]) -> int:
        """Blocks that nobody would hold without all of these."""
        return sum(count == self._refs[block] for block, count in Counter(chain.from_iterable(holders)).items())

    def match(self, hashes: Sequence[BlockHash]) -> list[BlockId]:
        """The longest prefix of `hashes` that is here, held or cached; nothing is held by this."""
        found = []
        for block_hash in hashes:
            if block_hash not in self._by_hash:
                break
            found.append(self._by_hash[block_hash])
        return found

    def take(self, count: int, prefix: Sequence[BlockId] = ()) -> list[BlockId] | None:
        """Holds the matched `prefix` and `count` blocks more; None, and nothing changed, if there are not so many."""
        if not self.can_take(count, prefix):
            return None
        for block in prefix:
            self._cached.pop(block, None)
            self._refs[block] = self._refs.get(block, 0) + 1
        return [*prefix, *(self._take_one() for _ in range(count))]

    def can_take(self, count: int, prefix: Sequence[BlockId] = ()) -> bool:
        return count <= self.num_available - sum(block in self._cached for block in prefix)

    def publish(self, block: BlockId, block_hash: BlockHash) -> None:
        """A held block is full and computed: others may match it. The first block of a hash wins."""
        assert block in self._refs, f"block {block} is published but nobody holds it"
        if self._prefix_cache and block_hash not in self._by_hash:
            self._by_hash[block_hash] = block
            self._hash_of[block] = block_hash

    def release(self, blocks: Sequence[BlockId]) -> None:
        """One holder less for each. The last block is let go first, so that a prefix outlives what follows it."""
        for block in reversed(blocks):
            assert block in self._refs, f"block {block} is released but nobody holds it"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._let_go(block)

    def _let_go(self, block: BlockId) -> None:
        del self._refs[block]
        if block in self._hash_of:
            self._cached[block] = None
        else:
            self._free.append(block)

    def _take_one(self) -> BlockId:
        block = self._free.popleft() if self._free else self._evict()
        self._refs[block] = 1
        return block

    def _evict(self) -> BlockId:
        block, _ = self._cached.popitem(last=False)
        del self._by_hash[self._hash_of.pop(block)]
        return block
