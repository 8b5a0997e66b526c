"""The block pool against a model of it: counts, references, what is matched, and which block is evicted."""

import hashlib
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from diptych.engine.block_pool import BlockPool, chain_hashes
from diptych.messages.ids import BlockHash, BlockId

NUM_BLOCKS = 6
chains = st.lists(st.integers(0, 1), min_size=1, max_size=4)          # few tokens, so that prefixes are shared often


def hashes_of(chain: list[int]) -> list[BlockHash]:
    return chain_hashes(chain, block_size=1)


class PoolMachine(RuleBasedStateMachine):
    """Sequences, a chain of hashes each, take blocks, compute and publish them, and give them back."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.held: list[tuple[list[BlockId], list[BlockHash]]] = []
        self.content: dict[BlockId, BlockHash] = {}                   # what was computed into each block last
        self.published: dict[BlockId, BlockHash] = {}
        self.lru: list[BlockId] = []

    @property
    def refs(self) -> Counter[BlockId]:
        return Counter(block for blocks, _ in self.held for block in blocks)

    @rule(chain=chains, more=st.integers(0, 3))
    def take(self, chain: list[int], more: int) -> None:
        hashes = hashes_of(chain)
        prefix = self.pool.match(hashes)
        by_hash = {block_hash: block for block, block_hash in self.published.items()}
        known = [block_hash in by_hash for block_hash in hashes]
        assert prefix == [by_hash[h] for h in hashes[: known.index(False) if False in known else len(known)]]
        assert [self.content[block] for block in prefix] == hashes[: len(prefix)], "matched a block that holds something else"

        num_new = len(hashes) - len(prefix) + more
        num_free = self.pool.num_free
        lru = [block for block in self.lru if block not in prefix]
        blocks = self.pool.take(num_new, prefix)
        if num_new > num_free + len(lru):
            assert blocks is None
            return
        assert blocks is not None
        assert blocks[: len(prefix)] == prefix
        new = blocks[len(prefix) :]
        assert len(set(new)) == num_new
        assert not set(new) & (set(self.refs) | set(prefix)), "gave a block that somebody holds"
        num_evicted = max(0, num_new - num_free)
        assert [block for block in new if block in lru] == lru[:num_evicted], "evicted other than the least recently released"
        self.lru = lru[num_evicted:]
        for block in new:
            self.published.pop(block, None)
            self.content.pop(block, None)
        self.held.append((blocks, hashes))

    @precondition(lambda self: self.held)
    @rule(draw=st.data())
    def publish(self, draw: st.DataObject) -> None:
        blocks, hashes = draw.draw(st.sampled_from(self.held))
        for block, block_hash in list(zip(blocks, hashes, strict=False))[: draw.draw(st.integers(1, 4))]:
            self.content[block] = block_hash
            self.pool.publish(block, block_hash)
            if block_hash not in self.published.values() and block not in self.published:
                self.published[block] = block_hash

    @precondition(lambda self: self.held)
    @rule(draw=st.data())
    def release(self, draw: st.DataObject) -> None:
        blocks, _ = self.held.pop(draw.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(blocks)
        self.lru += [block for block in reversed(blocks) if block not in self.refs and block in self.published]

    @invariant()
    def counts(self) -> None:
        assert self.pool.num_held == len(self.refs)
        assert self.pool.num_cached == len(self.lru)
        assert self.pool.num_free + self.pool.num_cached + self.pool.num_held == NUM_BLOCKS
        assert self.pool.num_available == self.pool.num_free + self.pool.num_cached


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=80, stateful_step_count=25)


def filled(num_blocks: int, chain: list[int], prefix_cache: bool = True) -> BlockPool:
    """A pool with one released sequence in its cache."""
    pool = BlockPool(num_blocks, prefix_cache)
    blocks = pool.take(len(chain))
    assert blocks is not None
    for block, block_hash in zip(blocks, hashes_of(chain), strict=True):
        pool.publish(block, block_hash)
    pool.release(blocks)
    return pool


def test_a_prefix_outlives_what_follows_it() -> None:
    pool = filled(4, [1, 2, 3, 4])
    for num_left in (3, 2, 1, 0):
        pool.take(1)
        assert len(pool.match(hashes_of([1, 2, 3, 4]))) == num_left


def test_a_take_that_fails_changes_nothing() -> None:
    """Cached blocks of the wanted prefix cannot be evicted for the rest of it."""
    pool = filled(4, [1, 2, 3])
    prefix = pool.match(hashes_of([1, 2, 3]))
    assert pool.take(2, prefix) is None
    assert (pool.num_free, pool.num_cached, pool.num_held) == (1, 3, 0)
    assert pool.match(hashes_of([1, 2, 3])) == prefix
    assert pool.take(1, prefix) is not None


def test_of_two_equal_blocks_the_first_is_matched_and_the_other_is_just_freed() -> None:
    pool = BlockPool(2)
    [first], [second] = pool.take(1) or [], pool.take(1) or []
    for block in (first, second):
        pool.publish(block, BlockHash(b"h"))
    assert pool.match([BlockHash(b"h")]) == [first]
    pool.release([second])
    assert (pool.num_free, pool.num_cached) == (1, 0)
    pool.release([first])
    assert (pool.num_free, pool.num_cached) == (1, 1)


def test_without_a_prefix_cache_nothing_is_kept() -> None:
    pool = filled(3, [1, 2, 3], prefix_cache=False)
    assert pool.match(hashes_of([1, 2, 3])) == []
    assert (pool.num_free, pool.num_cached) == (3, 0)


def test_a_block_that_nobody_holds_cannot_be_released_or_published() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="block 0 is released but nobody holds it"):
        pool.release([BlockId(0)])
    with pytest.raises(AssertionError, match="block 1 is published but nobody holds it"):
        pool.publish(BlockId(1), BlockHash(b"h"))


@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4), shared=st.integers(0, 4), picked=st.sets(st.integers(0, 3)))
def test_what_holders_would_free_by_themselves_and_together(lengths: list[int], shared: int, picked: set[int]) -> None:
    """Sequences with a prefix of `shared` blocks, or all of it, that the first one has computed."""
    pool, hashes = BlockPool(40), hashes_of([1] * shared)
    first = pool.take(shared + lengths[0]) or []
    for block, block_hash in zip(first, hashes, strict=False):
        pool.publish(block, block_hash)
    held = [first, *(pool.take(length, pool.match(hashes)) or [] for length in lengths[1:])]
    alone = 0 if len(held) > 1 else shared
    assert [pool.num_private(blocks) for blocks in held] == [length + alone for length in lengths]
    chosen = [blocks for i, blocks in enumerate(held) if i in picked]
    freed, before = pool.num_freed_by(chosen), pool.num_available
    for blocks in chosen:
        pool.release(blocks)
    assert pool.num_available - before == freed


# Chained hashes

tokens = st.lists(st.integers(0, 2**32), max_size=24)


@settings(max_examples=100)
@given(tokens=tokens, block_size=st.integers(1, 6), data=st.data())
def test_known_hashes_are_continued(tokens: list[int], block_size: int, data: st.DataObject) -> None:
    hashes = chain_hashes(tokens, block_size)
    assert len(hashes) == len(tokens) // block_size
    known = hashes[: data.draw(st.integers(0, len(hashes)))]
    assert chain_hashes(tokens, block_size, known) == hashes
    assert chain_hashes(tuple(tokens), block_size, tuple(known)) == hashes


@settings(max_examples=200)
@given(a=tokens, b=tokens, block_size=st.integers(1, 4), shared=st.integers(0, 24))
def test_equal_hashes_mean_equal_prefixes(a: list[int], b: list[int], block_size: int, shared: int) -> None:
    b = a[:shared] + b
    for i, (x, y) in enumerate(zip(chain_hashes(a, block_size), chain_hashes(b, block_size), strict=False)):
        assert (x == y) == (a[: (i + 1) * block_size] == b[: (i + 1) * block_size])


def test_hashes_are_the_same_on_every_machine() -> None:
    """They are compared between workers."""
    first = hashlib.blake2b(bytes([1, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0]), digest_size=16).digest()
    second = hashlib.blake2b(first + bytes([3] + [0] * 7 + [4] + [0] * 7), digest_size=16).digest()
    assert chain_hashes([1, 258, 3, 4, 5], 2) == [first, second]
