"""Decode steps beside pages: which pages go where, at which pace, and how the figures come of it."""

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest
import torch

from diptych.cluster.bench import decode_load
from diptych.cluster.bench.decode_load import MAX_UNDER_WAY, PAGE_GROUPS, DecodePair, FlowingEnd, Landing, Shape
from diptych.cluster.bench.transfer_peer import Path, Remote
from diptych.kvtransfer.layout import KVLayout
from diptych.kvtransfer.transport import Peer, TransferStats
from diptych.messages.ids import BlockId
from diptych.messages.membership import MemoryDescriptor

LAYOUT = KVLayout("m", torch.bfloat16, num_layers=3, num_kv_heads=1, head_dim=32, block_size=16)
BLOCKS = [BlockId(block) for block in (7, 2, 9, 4)]
DESCRIPTOR = MemoryDescriptor("shm", "here", b"pool", 16, LAYOUT.page_bytes, 8)
SHAPE = Shape(context=32, arriving_bytes=4 * LAYOUT.block_bytes, prefill_s=0.8, steps=10, rounds=3)
PATH = Path("shm", "shm", "cpu")


@dataclass
class Answering:
    """Both ends: steps take 2 ms, while pages come 3, and 1000 pages have come at each look."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    flowing: bool = False
    counted: int = 0

    def tell(self, *call: Any) -> None:
        self.calls.append(call)
        self.flowing = True

    def answer(self) -> None:
        return None

    def call(self, *call: Any) -> Any:
        self.calls.append(call)
        match call[0]:
            case "start":
                return Landing(DESCRIPTOR, LAYOUT, BLOCKS)
            case "step_ms":
                return 3.0 if self.flowing else 2.0
            case "stop":
                self.flowing = False
            case "num_counted":
                self.counted += 1000
                return self.counted
        return None


@pytest.fixture
def ends() -> Answering:
    return Answering()


def pair(ends: Answering) -> DecodePair:
    return DecodePair(PATH, SHAPE, cast(Remote, ends), cast(Remote, ends))


def test_every_page_of_the_receivers_blocks_is_written_once(ends: Answering) -> None:
    pair(ends)
    assert ("allocate", LAYOUT, len(BLOCKS)) in ends.calls
    [(_, here, there)] = [call for call in ends.calls if call[0] == "share_out"]
    assert sorted(there) == sorted(LAYOUT.page_id(block, layer) for block in BLOCKS for layer in range(3))
    assert sorted(here) == list(range(len(BLOCKS) * 3))
    assert set(there[: len(BLOCKS)] % 3) == {0}, "layer by layer, as a prefill sends them"


def test_steps_alone_and_beside_take_turns(ends: Answering) -> None:
    paced, flooded = pair(ends).rows(64)
    assert [(row.alone_ms, row.beside_ms, round(row.slow_down, 3)) for row in (paced, flooded)] == [(2.0, 3.0, 0.5)] * 2
    assert min(paced.gbps, flooded.gbps) > 0
    assert ("decode", 64) in ends.calls
    periods = [call[2] for call in ends.calls if call[0] == "flow"]
    assert periods == [SHAPE.prefill_s / PAGE_GROUPS, 0.0] * SHAPE.rounds
    order = [call[0] for call in ends.calls if call[0] in ("step_ms", "flow", "stop")]
    assert order == ["step_ms", "flow", "step_ms", "stop"] * 2 * SHAPE.rounds


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Link:
    """A transport whose pages take `page_s` each, one after the other."""

    clock: Clock
    page_s: float
    started: list[tuple[float, int]] = field(default_factory=list)      # when, pages so far
    done_at: list[float] = field(default_factory=list)

    def write_pages(self, peer: Peer, src: Any, dst: Any, imm: Any) -> None:
        begins = max([self.clock.now, *self.done_at[-1:]])
        self.done_at += [begins + (i + 1) * self.page_s for i in range(len(src))]
        self.started.append((self.clock.now, len(self.done_at)))

    @property
    def num_done(self) -> int:
        return sum(at <= self.clock.now for at in self.done_at)

    @property
    def stats(self) -> TransferStats:
        return TransferStats(self.num_done)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(decode_load, "time", made)
    return made


def flowing(link: Link) -> FlowingEnd:
    end = FlowingEnd(PATH, "c", "w")
    end._transport, end._peer = cast(Any, link), Peer(DESCRIPTOR)
    end.share_out(np.arange(2 * PAGE_GROUPS), np.arange(2 * PAGE_GROUPS))
    return end


def test_a_pace_is_kept_where_the_link_is_fast_enough(clock: Clock) -> None:
    link = Link(clock, page_s=1e-6)
    flowing(link).flow(1.0, 0.1)
    assert [at for at, _ in link.started] == pytest.approx([50.0 + 0.1 * i for i in range(11)], abs=1e-3)


@pytest.mark.parametrize("period_s", [0.0, 1e-3], ids=["a flood", "a pace that is too high"])
def test_a_busy_link_is_never_idle_nor_buried(clock: Clock, period_s: float) -> None:
    link = Link(clock, page_s=0.01)
    flowing(link).flow(2.0, period_s)
    assert link.done_at[-1] >= 52.0, "it was idle before the end"
    assert all(sent - sum(done <= at for done in link.done_at) <= 2 * (MAX_UNDER_WAY + 1) for at, sent in link.started)
