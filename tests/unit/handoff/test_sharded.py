"""Handoffs between workers whose ranks share the heads differently. What any history must keep, test_handoff_properties.py asks of them,
too."""

import pytest
from harness.fake_cluster import PAGE_S, TIMEOUT_S, FakeCluster
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from diptych.kvtransfer.transport import NUM_IMMS
from diptych.messages.handoff import KVAccept, KVProbeAccept
from diptych.messages.ids import Imm, WorkerId
from diptych.messages.requests import FailureKind
from diptych.prefill_worker.probe import Floor

PREFILL, DECODE = WorkerId("prefill-0"), WorkerId("decode-0")
PROMPT = list(range(20))
TPS = [(1, 1), (1, 2), (2, 1), (2, 2), (2, 4), (4, 2), (1, 4), (4, 1)]
BLOCKS, LAYERS = 5, 2


@settings(max_examples=40)
@given(
    tps=st.sampled_from(TPS),
    prefill_block_size=st.sampled_from([4, 4, 3, 6, 16]),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    max_step_tokens=st.sampled_from([1, 5, 64]),
)
def test_any_ranks_any_prompts_any_chunking(
    tps: tuple[int, int], prefill_block_size: int, lengths: list[int], max_step_tokens: int
) -> None:
    """All at once, then again with warm prefix caches."""
    cluster = FakeCluster(num_blocks=40, max_step_tokens=max_step_tokens, prefill_block_size=prefill_block_size, tps=tps)
    for _ in range(2):
        answers = [cluster.submit(list(range(length)), max_tokens=3) for length in lengths]
        cluster.settle(20.0)
        assert all(answer.complete for answer in answers), [answer.failure for answer in answers]
    cluster.assert_nothing_leaked()


@pytest.mark.parametrize("tps", TPS)
def test_what_is_told_of_pages_is_told_of_whole_ones(tps: tuple[int, int]) -> None:
    cluster = FakeCluster(tps=tps)
    cluster.submit(PROMPT, max_tokens=3)
    cluster.settle()
    [span] = cluster.spans
    layout = cluster.workers[DECODE].replica.pool.layout
    assert (span.num_pages, span.num_bytes) == (BLOCKS * LAYERS, BLOCKS * layout.block_bytes)
    assert layout.block_bytes == LAYERS * 2 * 4 * 4 * 8


def until_pages_leave(cluster: FakeCluster, announced: bool) -> None:
    """And, if `announced`, until the receiver knows that all have."""
    while not cluster.fabric.in_flight or (announced and not cluster.workers[DECODE]._receiver.is_waiting):
        cluster.network.deliver_all()
        cluster.turn()


@pytest.mark.parametrize("tps", TPS)
def test_kv_that_lacks_a_piece_is_never_decoded(tps: tuple[int, int]) -> None:
    """Of whichever rank: the sum over all must be exact."""
    for lost in (0, -1):
        cluster = FakeCluster(tps=tps)
        answer = cluster.submit(PROMPT, max_tokens=3)
        until_pages_leave(cluster, announced=True)
        cluster.fabric.in_flight.pop(lost)
        cluster.settle(TIMEOUT_S - 1)
        assert list(answer.tokens) == [0], "decoded from KV that did not come"
        cluster.settle(3 * TIMEOUT_S)
        assert answer.failure is not None
        assert answer.failure.kind is FailureKind.TIMEOUT
        cluster.assert_nothing_leaked()


@pytest.mark.parametrize("tps", TPS)
def test_a_piece_too_many_ends_the_handoff(tps: tuple[int, int]) -> None:
    cluster = FakeCluster(tps=tps)
    answer = cluster.submit(PROMPT, max_tokens=3)
    until_pages_leave(cluster, announced=True)
    target = cluster.transports_of(DECODE)[-1]
    imm = next(write.imm for write in cluster.fabric.in_flight if write.target == target.location)
    cluster.fabric.counters[target.location][imm] += 1
    cluster.settle(3 * TIMEOUT_S)
    assert answer.failure is not None
    assert answer.failure.kind is FailureKind.INTERNAL
    assert "10 pages and 1 of 8 pieces counted, 10 announced" in answer.failure.message
    cluster.assert_nothing_leaked()


def assert_blocks_stay_held(cluster: FakeCluster, for_s: float) -> None:
    until = cluster.now + for_s
    while cluster.now < until:
        cluster.network.deliver_all()
        cluster.turn()
        cluster.now += 0.01
    assert cluster.workers[DECODE].engine.pool.num_held == BLOCKS, "used again although a rank's pieces may still land"


@pytest.mark.parametrize("tps", [(2, 1), (1, 2), (2, 4)])
def test_blocks_stay_held_until_every_rank_has_stopped(tps: tuple[int, int]) -> None:
    cluster = FakeCluster(tps=tps)
    answer = cluster.submit(PROMPT, max_tokens=3)
    until_pages_leave(cluster, announced=False)
    last = cluster.fabric.in_flight[-1]
    cluster.fabric.in_flight[:] = [last]
    cluster.abort(answer)
    assert_blocks_stay_held(cluster, for_s=0.5)
    cluster.settle()
    cluster.assert_nothing_leaked()


@pytest.mark.parametrize("tps", [(2, 1), (1, 2), (2, 4)])
def test_blocks_stay_held_until_every_rank_has_fenced(tps: tuple[int, int]) -> None:
    cluster = FakeCluster(tps=tps)
    cluster.submit(PROMPT, max_tokens=3)
    until_pages_leave(cluster, announced=False)
    cluster.kill(PREFILL)
    last = cluster.transports_of(DECODE)[-1]
    last.fences = False
    cluster.restart(PREFILL)
    assert_blocks_stay_held(cluster, for_s=1.0)
    last.fences = True
    cluster.settle()
    cluster.assert_nothing_leaked()


def test_a_counter_that_the_receiver_does_not_lend_ends_the_handoff() -> None:
    """It stands for several behind it, and there are no more."""
    cluster = FakeCluster(tps=(2, 1))
    answer = cluster.submit(PROMPT, max_tokens=3)
    while not (accepts := [i for i, letter in enumerate(cluster.network.in_flight) if isinstance(letter.message, KVAccept)]):
        cluster.network.deliver_all()
        cluster.turn()
    [letter] = [cluster.network.in_flight.pop(i) for i in accepts]
    message = letter.message
    assert message.imm < NUM_IMMS // 4
    forged = KVAccept(message.ticket, message.num_cached_blocks, message.block_ids, Imm(NUM_IMMS // 4))
    cluster.gateway.send(letter.to, forged)
    cluster.settle()
    assert answer.failure is not None
    assert f"accepted with counter {NUM_IMMS // 4} of {NUM_IMMS // 4}" in answer.failure.message
    cluster.assert_nothing_leaked()


def test_a_counter_that_the_receiver_does_not_lend_ends_a_probe() -> None:
    cluster = FakeCluster(floor=Floor(0.0, refuse=True), tps=(2, 1))
    while not (accepts := [i for i, each in enumerate(cluster.network.in_flight) if isinstance(each.message, KVProbeAccept)]):
        cluster.network.deliver_all()
        cluster.turn()
    [letter] = [cluster.network.in_flight.pop(i) for i in accepts]
    cluster.gateway.send(letter.to, structs.replace(letter.message, imm=Imm(NUM_IMMS // 4)))
    cluster.network.deliver_all()
    cluster.turn()
    assert not any(transport.stats.num_pages for transport in cluster.transports_of(PREFILL)), "written under a counter of nobody's"
    for _ in range(200):
        cluster.step()
    assert len(cluster.links) == 1, "measured at the next try"
    cluster.assert_nothing_leaked()


@pytest.mark.parametrize(("tps", "others"), [((1, 2), ()), ((2, 1), ()), ((2, 4), ("fast",)), ((4, 2), ("fast",))])
def test_links_are_measured_over_all_ranks(tps: tuple[int, int], others: tuple[str, ...]) -> None:
    cluster = FakeCluster(floor=Floor(0.0, refuse=True), tps=tps, others=others)
    for transport in cluster.transports_of(PREFILL):
        transport.page_s = PAGE_S / (4 if transport.name == "fast" else 1)
    for _ in range(100):
        cluster.step()
    [link] = cluster.links
    layout = cluster.workers[DECODE].replica.pool.layout
    speed = 4 if others else 1
    assert link.transport == (others or ("fake",))[0]
    assert link.latency_s == pytest.approx(8 / tps[0] * PAGE_S / speed)
    assert link.gbps == pytest.approx(layout.piece_bytes * tps[0] / PAGE_S / 1e9 * speed)
    assert link.num_bytes % layout.page_bytes == 0
    answer = cluster.submit(PROMPT, max_tokens=3)
    cluster.settle()
    assert answer.complete
    assert cluster.spans[0].transport == link.transport
    cluster.assert_nothing_leaked()


def test_pieces_of_another_size_are_refused() -> None:
    cluster = FakeCluster(num_prefill=2, tps=(2, 2))
    cluster.tps = None
    cluster.kill(PREFILL)
    cluster.restart(PREFILL)
    answer = cluster.submit(PROMPT, max_tokens=3)
    cluster.settle()
    assert answer.failure is not None
    assert "piece_heads 1, there 0" in answer.failure.message
    cluster.assert_nothing_leaked()
