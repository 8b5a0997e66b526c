"""Links are measured when workers meet: each pair's, anew where it may be another, and never at a request's cost."""

import logging

import pytest
from harness.fake_cluster import PAGE_S, FakeCluster
from harness.probes import DECODE, NO_FLOOR, PREFILL, PROMPT, gbps, run
from harness.process_cluster import process_cluster
from harness.ucx import needs_ucx

from diptych.kvtransfer.fake import FakeTransport
from diptych.kvtransfer.transport import Peer
from diptych.messages.handoff import KVProbe
from diptych.messages.ids import Imm
from diptych.messages.requests import FailureKind
from diptych.prefill_worker.probe import Floor
from diptych.prefill_worker.probe_times import REPEAT_S, RETRY_S


def test_every_pair_is_measured_once_and_told_to_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cluster = FakeCluster(num_prefill=2, num_decode=2, floor=NO_FLOOR)
    run(cluster, 2 * RETRY_S + 0.5)                          # a decode worker lends to one at a time
    pairs = [(link.worker.worker_id, link.decode_id) for link in cluster.links]
    assert sorted(pairs) == [(f"prefill-{i}", f"decode-{j}") for i in range(2) for j in range(2)]
    for link in cluster.links:
        assert (link.transport, link.refused) == ("fake", False)
        assert link.latency_s == pytest.approx(PAGE_S)
        assert link.gbps == pytest.approx(gbps(cluster))
    assert sum("GB/s" in record.message for record in caplog.records) == 4
    assert sorted(cluster.workers[PREFILL].status().links, key=str) == sorted(
        (link for link in cluster.links if link.worker.worker_id == PREFILL), key=str
    )
    cluster.assert_nothing_leaked()


def test_a_restarted_peer_is_measured_anew() -> None:
    cluster = FakeCluster(floor=NO_FLOOR)
    run(cluster)
    cluster.kill(DECODE)
    cluster.restart(DECODE)
    assert cluster.workers[PREFILL].links() != ()
    run(cluster)
    assert len(cluster.links) == 2
    assert len(cluster.workers[PREFILL].links()) == 1


def test_a_link_that_was_down_is_measured_anew_without_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(floor=NO_FLOOR)
    run(cluster)
    connect = cluster.transports[PREFILL].connect
    monkeypatch.setattr(cluster.transports[PREFILL], "connect", lambda descriptor: None)
    run(cluster)
    assert len(cluster.links) == 1
    monkeypatch.setattr(cluster.transports[PREFILL], "connect", connect)
    cluster.transports[PREFILL].page_s = 2 * PAGE_S
    run(cluster)
    assert [link.gbps for link in cluster.links] == pytest.approx([gbps(cluster), gbps(cluster) / 2])


def test_a_worker_that_drains_does_not_hold_up_the_others() -> None:
    cluster = FakeCluster(num_decode=2, floor=NO_FLOOR)
    cluster.workers[DECODE].drain()
    cluster.publish()
    run(cluster, 2 * RETRY_S)
    assert [link.decode_id for link in cluster.links] == ["decode-1"]


def test_what_a_counter_was_busy_with_before_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last handoff that used it may have been confirmed before its writer put the time down; so may a round of the probe."""
    cluster, busy_s, asked = FakeCluster(floor=NO_FLOOR), FakeTransport.busy_s, []

    def late(self: FakeTransport, peer: Peer, imm: Imm) -> float:
        asked.append(imm)
        return PAGE_S / 100 + (busy_s(self, peer, imm) if len(asked) > 2 else 0.0)

    monkeypatch.setattr(FakeTransport, "busy_s", late)
    run(cluster)
    assert cluster.links[0].latency_s == pytest.approx(PAGE_S)


def test_who_is_not_to_measure_never_does() -> None:
    cluster = FakeCluster()
    run(cluster, 2 * REPEAT_S)
    cluster.submit(PROMPT, max_tokens=3)
    run(cluster, 2 * REPEAT_S)
    assert cluster.links == []


@pytest.mark.parametrize("transport", ["shm", pytest.param("ucx", marks=needs_ucx)])
def test_processes_measure_their_link_and_a_successor_anew(transport: str) -> None:
    with process_cluster(transport, "prefill-0", "decode-0", probe_links=True) as cluster:
        cluster.pump(lambda: len(cluster.links) == 1, 20.0)
        cluster.kill("decode-0")
        cluster.start("decode-0")
        cluster.submit(PROMPT, max_tokens=5)
        cluster.pump(lambda: len(cluster.links) == 2, 20.0)
        cluster.finish(20.0)
        cluster.assert_whole()
    for link in cluster.links:
        assert (link.worker.worker_id, link.decode_id, link.transport) == (PREFILL, DECODE, transport)
        assert 0 < link.latency_s < 1
        assert link.gbps > 0


# The floor

def test_below_the_floor_a_pair_is_not_used_until_it_is_faster() -> None:
    cluster = FakeCluster(floor=Floor(1e3, refuse=True))
    run(cluster)
    assert cluster.links[0].refused
    answer = cluster.submit(PROMPT, max_tokens=3)
    run(cluster)
    assert answer.failure is not None
    assert (answer.failure.kind, answer.failure.retryable) == (FailureKind.REFUSED, True)
    assert f"{gbps(cluster):.2f} GB/s" in answer.failure.message
    assert "the floor of 1000 GB/s" in answer.failure.message
    single = cluster.submit(PROMPT, max_tokens=1)            # needs no link
    run(cluster)
    assert single.complete
    cluster.transports[PREFILL].page_s = 1e-12
    run(cluster, REPEAT_S + 1)
    assert not cluster.links[-1].refused
    again = cluster.submit(PROMPT, max_tokens=3)
    run(cluster)
    assert again.complete
    cluster.assert_nothing_leaked()


def test_a_warning_is_all_if_the_spec_says_so(caplog: pytest.LogCaptureFixture) -> None:
    cluster = FakeCluster(floor=Floor(1e3, refuse=False))
    run(cluster)
    answer = cluster.submit(PROMPT, max_tokens=3)
    run(cluster)
    assert answer.complete
    assert [r.message.partition("; ")[2] for r in caplog.records] == ["below the floor of 1000 GB/s, used all the same"]


# Beside handoffs

def test_a_probe_waits_for_memory_and_for_handoffs() -> None:
    cluster = FakeCluster(floor=NO_FLOOR)
    blocks = cluster.workers[DECODE].engine.pool.take(14)
    assert blocks is not None
    run(cluster)
    assert cluster.links == []
    cluster.workers[DECODE].engine.pool.release(blocks)
    cluster.submit(PROMPT, max_tokens=3)
    for _ in range(20):                                      # the handoff is under way, and its pages do not land
        cluster.network.deliver_all()
        cluster.turn()
        cluster.now += 0.1
    assert not any(isinstance(letter.message, KVProbe) for letter in cluster.network.in_flight)
    assert cluster.links == []
    run(cluster, RETRY_S + 1)
    assert len(cluster.links) == 1
    assert all(answer.complete for answer in cluster.answers.values())


def test_blocks_that_are_only_cached_are_lent() -> None:
    cluster = FakeCluster(floor=NO_FLOOR)
    run(cluster)
    pool, first = cluster.workers[DECODE].engine.pool, 0
    while pool.num_free >= 4:                                # fewer would be no loan
        cluster.submit([first + token for token in PROMPT], max_tokens=2)
        run(cluster)
        first += 1
    cluster.kill(PREFILL)
    cluster.restart(PREFILL)
    run(cluster, RETRY_S)
    assert len(cluster.links) == 2
    cluster.assert_nothing_leaked()


def never_quiet(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    prober = cluster.workers[PREFILL]._prober
    monkeypatch.setattr(prober, "tick", lambda now, is_quiet, tick=prober.tick: tick(now, False))


def test_a_refused_link_is_measured_beside_others_handoffs_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(floor=Floor(1e3, refuse=True))
    run(cluster)
    assert cluster.links[0].refused
    with monkeypatch.context() as patch:
        never_quiet(cluster, patch)
        run(cluster, REPEAT_S + 1)
        assert len(cluster.links) == 1
        run(cluster, REPEAT_S)
        assert [link.refused for link in cluster.links] == [True, True], "it is not used because of an earlier figure"
        cluster.transports[PREFILL].page_s = 1e-12
        run(cluster, 2 * REPEAT_S)
        assert [link.refused for link in cluster.links] == [True, True, False]
        run(cluster, 4 * REPEAT_S)
        assert len(cluster.links) == 3
    cluster.assert_nothing_leaked()


def test_a_pair_that_is_never_quiet_is_measured_beside_its_handoffs_and_once_more_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    cluster = FakeCluster(floor=NO_FLOOR)
    with monkeypatch.context() as patch:
        never_quiet(cluster, patch)
        run(cluster, REPEAT_S - 1)
        assert cluster.links == []
        run(cluster, 2)
        assert len(cluster.links) == 1
        assert caplog.records[-1].getMessage().endswith("a page (measured beside handoffs)")
        run(cluster, 4 * REPEAT_S)
        assert len(cluster.links) == 1, "it is fast enough"
    run(cluster)
    assert len(cluster.links) == 2
    run(cluster, 4 * REPEAT_S)
    assert len(cluster.links) == 2
    cluster.assert_nothing_leaked()


def test_a_figure_beside_handoffs_refuses_no_link_but_is_warned_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = FakeCluster(floor=Floor(1e3, refuse=True))
    with monkeypatch.context() as patch:
        never_quiet(cluster, patch)
        run(cluster, REPEAT_S + 1)
        assert [(link.below_floor, link.refused) for link in cluster.links] == [(True, False)]
        assert caplog.records[0].getMessage().endswith("used all the same (measured beside handoffs)")
        assert cluster.submit(PROMPT, max_tokens=3).failure is None
        run(cluster, 2 * REPEAT_S)
        assert all(answer.complete for answer in cluster.answers.values())
        assert [link.refused for link in cluster.links] == [False, False]
    run(cluster, REPEAT_S)
    assert [link.refused for link in cluster.links] == [False, False, True]


def test_a_handoff_that_begins_beside_a_probe_is_not_the_links_fault() -> None:
    cluster = FakeCluster(floor=Floor(1e3, refuse=True))
    while not cluster.fabric.in_flight:
        cluster.network.deliver_all()
        cluster.turn()
    answer = cluster.submit(PROMPT, max_tokens=3)
    run(cluster)
    assert answer.complete
    assert [link.refused for link in cluster.links] == [False]
    run(cluster, REPEAT_S)
    assert [link.refused for link in cluster.links] == [False, True]


def test_a_link_that_is_found_anew_under_load_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(floor=NO_FLOOR)
    run(cluster)
    never_quiet(cluster, monkeypatch)
    connect = cluster.transports[PREFILL].connect
    with monkeypatch.context() as patch:
        patch.setattr(cluster.transports[PREFILL], "connect", lambda descriptor: None)
        run(cluster, RETRY_S + 1)
    monkeypatch.setattr(cluster.transports[PREFILL], "connect", connect)
    cluster.transports[PREFILL].page_s = 2 * PAGE_S
    run(cluster, REPEAT_S + RETRY_S + 1)
    assert [link.gbps for link in cluster.links] == pytest.approx([gbps(cluster), gbps(cluster) / 2])
