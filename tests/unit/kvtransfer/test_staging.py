"""A staging pool is small, and its pages are shared: none is made anew while a write may read it, none is lost, nobody starves."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from harness.shards import fill, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.engine.fake_runner import fake_layout, kv_of
from diptych.kvtransfer.bundle import TransportBundle
from diptych.kvtransfer.fake import FakeFabric, FakeTransport
from diptych.kvtransfer.layout import KVLayout
from diptych.kvtransfer.plan import PagePlan
from diptych.kvtransfer.sharded import KVShards, ShardedBundle
from diptych.kvtransfer.staging import StagedPages, Staging
from diptych.kvtransfer.transport import KVPool, Peer
from diptych.messages.errors import LayoutMismatch
from diptych.messages.ids import BlockId, Imm

SRC_SIZE, DST_SIZE, LAYERS = 6, 4, 2
NUM_TOKENS = 22
ALL_LAYERS, ALL_BLOCKS = range(LAYERS), -(-NUM_TOKENS // DST_SIZE)


class Bench:
    """One sender whose pool is full of known numbers, and one receiver."""

    def __init__(self, staging_blocks: int) -> None:
        self.fabric = FakeFabric()
        source = KVPool(fake_layout(SRC_SIZE), torch.zeros(fake_layout(SRC_SIZE).shape(8), dtype=torch.int64))
        for position in range(8 * SRC_SIZE):
            for layer in range(LAYERS):
                source.tensor[position // SRC_SIZE, layer, :, 0, position % SRC_SIZE, 0] = kv_of(7, position, layer)
        bundle = TransportBundle([self.fabric.transport("staging")])
        self.staging = Staging(source, bundle.allocate(fake_layout(DST_SIZE), staging_blocks), bundle)
        self.receiver: FakeTransport = self.fabric.transport("receiver")
        self.pool = self.receiver.allocate(fake_layout(DST_SIZE), 32)
        peer = bundle.connect([self.receiver.register(self.pool)])
        assert peer is not None
        self.peer: Peer = peer

    @property
    def num_pages(self) -> int:
        return self.staging.pool.num_blocks * LAYERS

    def open(self, imm: int) -> StagedPages:
        """A handoff of NUM_TOKENS tokens from blocks 0 to 3 here to blocks imm × 8, … there."""
        there = [BlockId(imm * 8 + i) for i in range(ALL_BLOCKS)]
        plan = PagePlan(LAYERS, [BlockId(i) for i in range(ALL_BLOCKS)], there, 0)
        return self.staging.open(plan, [BlockId(i) for i in range(4)], self.peer, Imm(imm))

    def push(self, imm: int, pages: StagedPages, num_ready: int = ALL_BLOCKS) -> int:
        """Pages that left."""
        writes = pages.take(ALL_LAYERS, num_ready)
        if len(writes):
            self.staging.transport.write_pages(self.peer, writes.src, writes.dst, Imm(imm))
        return len(writes)

    def assert_arrived(self, imm: int) -> None:
        for token in range(NUM_TOKENS):
            for layer in range(LAYERS):
                found = self.pool.tensor[imm * 8 + token // DST_SIZE, layer, :, 0, token % DST_SIZE, 0]
                assert found.tolist() == [kv_of(7, token, layer)] * 2


def test_a_pool_of_one_block_is_enough_for_everybody() -> None:
    bench = Bench(staging_blocks=1)
    handoffs = [bench.open(imm) for imm in range(3)]
    for _ in range(3 * ALL_BLOCKS):
        for imm, pages in enumerate(handoffs):
            bench.push(imm, pages)
        assert any(pages.is_short for pages in handoffs) or all(pages.finished for pages in handoffs)
        bench.fabric.land_all()
    for imm, pages in enumerate(handoffs):
        assert pages.finished
        bench.assert_arrived(imm)
        pages.close()
    assert bench.staging.num_free == bench.num_pages


def test_what_was_written_comes_back_from_a_handoff_that_has_nothing_more_to_say() -> None:
    """Its commit may be long in coming; others need the pages now."""
    bench = Bench(staging_blocks=ALL_BLOCKS)
    first, second = bench.open(0), bench.open(1)
    assert bench.push(0, first) == bench.num_pages
    assert bench.push(1, second) == 0, "still read"
    bench.fabric.land_all()
    assert bench.push(1, second) == bench.num_pages
    first.close()
    assert bench.staging.num_free == 0, "the second's are not the first's to give"


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32), staging_blocks=st.integers(1, 3))
def test_no_page_is_given_out_twice_and_none_is_lost(seed: int, staging_blocks: int) -> None:
    choose, bench, handoffs = random.Random(seed), Bench(staging_blocks), dict[int, StagedPages]()
    for _ in range(60):
        match choose.choice(["open", "push", "push", "land", "give up"]):
            case "open":
                for imm in [imm for imm in range(3) if imm not in handoffs][:1]:
                    handoffs[imm] = bench.open(imm)
            case "push" if handoffs:
                imm = choose.choice(list(handoffs))
                bench.push(imm, handoffs[imm], choose.randint(0, ALL_BLOCKS))
            case "land" if bench.fabric.in_flight:
                bench.fabric.land(choose.randrange(len(bench.fabric.in_flight)))
            case "give up" if handoffs:
                imm = choose.choice(list(handoffs))
                if bench.staging.transport.stop(bench.peer, Imm(imm), 0.0):
                    handoffs.pop(imm).close()
        held = [page for pages in handoffs.values() for page in pages._held]
        assert len(held) == len(set(held)) == bench.num_pages - bench.staging.num_free
    for _ in range(3 * ALL_BLOCKS):
        for imm, pages in handoffs.items():
            bench.push(imm, pages)
        bench.fabric.land_all()
    for imm, pages in handoffs.items():
        assert pages.finished
        bench.assert_arrived(imm)
        pages.close()
    assert bench.staging.num_free == bench.num_pages


def test_a_layout_of_other_heads_is_refused_before_anything_is_made() -> None:
    source = KVPool(fake_layout(), torch.zeros(fake_layout().shape(2), dtype=torch.int64))
    bundle = TransportBundle([FakeFabric().transport("staging")])
    other = KVLayout("fake", torch.int64, num_layers=2, num_kv_heads=2, head_dim=1, block_size=4)
    with pytest.raises(LayoutMismatch, match="num_kv_heads 1, there 2"):
        Staging(source, bundle.allocate(other, 1), bundle)


FP8 = torch.float8_e4m3fn


def shards(layout: KVLayout, num_blocks: int) -> KVShards:
    pools = [KVPool(layout, torch.zeros(layout.shape(num_blocks), dtype=layout.dtype)) for _ in range(layout.tp_size)]
    return KVShards(layout, tuple(pools))


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize(("dtypes", "sizes"), [((torch.float32, FP8), (6, 4)), ((FP8, torch.bfloat16), (4, 8)), ((FP8, FP8), (4, 2))])
def test_ranks_make_together_what_one_would(tp_size: int, dtypes: tuple[torch.dtype, torch.dtype], sizes: tuple[int, int]) -> None:
    """Each its own heads, with the scales of those."""
    here = KVLayout("m", dtypes[0], 3, 4, 8, sizes[0], piece_heads=1)
    scales = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(0)) + 0.25
    pages = np.array([0, 1, 2, 4, 5, 8])
    made = []
    for tp in (1, tp_size):
        source_layout = replace(here, tp_size=tp)
        source = shards(source_layout, 4)
        bits = shards(replace(source_layout, dtype=torch.int8), 4) if dtypes[0] is FP8 else source
        fill(bits)
        if dtypes[0] is FP8:
            source = KVShards(source_layout, tuple(KVPool(source_layout, pool.tensor.view(FP8)) for pool in bits.ranks))
        fabric = FakeFabric()
        bundle = ShardedBundle([TransportBundle([fabric.transport(f"rank {rank}")]) for rank in range(tp)])
        staging = Staging(source, bundle.allocate(replace(source_layout, dtype=dtypes[1], block_size=sizes[1]), 3), bundle, scales)
        staging.make(pages, np.array([3, 7, 1, 0, 8, 2]), np.array([2, 0, 3]))
        made.append(whole(KVShards(staging.layout, tuple(KVPool(staging.layout, p.tensor.float()) for p in staging.pool.ranks))))
    assert torch.equal(made[0].nan_to_num(7777.0), made[1].nan_to_num(7777.0))
    assert made[0].any()


def test_ranks_that_are_not_as_many_are_refused() -> None:
    source = KVLayout("m", torch.float32, 3, 4, 8, 6, tp_size=2, piece_heads=1)
    bundle = ShardedBundle([TransportBundle([FakeFabric().transport("staging")])])
    with pytest.raises(LayoutMismatch, match="tp_size 2, there 1"):
        Staging(shards(source, 2), bundle.allocate(replace(source, tp_size=1, block_size=4), 1), bundle)
