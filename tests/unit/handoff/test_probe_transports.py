"""Where a pair has several transports all are measured: the fastest is used, and another while that one does not reach."""

import logging
import random
from functools import partial

import pytest
from harness.fake_cluster import PAGE_S, TIMEOUT_S, FakeCluster
from harness.probes import NO_FLOOR, PREFILL, PROMPT, end_of_faults, gbps, happen, run
from harness.process_cluster import process_cluster
from harness.ucx import needs_ucx
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.kvtransfer.fake import FakeTransport
from diptych.kvtransfer.selection import AS_FAST
from diptych.kvtransfer.transport import Peer
from diptych.messages.errors import PeerGone
from diptych.messages.membership import MemoryDescriptor
from diptych.prefill_worker.link_prober import LINK_WAIT_S
from diptych.prefill_worker.probe import Floor
from diptych.prefill_worker.probe_times import REPEAT_S


def chosen(cluster: FakeCluster) -> tuple[str, list[str]]:
    """By the last measurement."""
    link = cluster.links[-1]
    return link.transport, [other.transport for other in link.others]


def transport_of(cluster: FakeCluster) -> str:
    """That a handoff uses now."""
    answer = cluster.submit([*PROMPT, len(cluster.answers)], max_tokens=3)
    run(cluster)
    assert answer.complete
    return cluster.spans[-1].transport


def test_the_fastest_transport_is_used_and_the_others_are_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cluster = FakeCluster(floor=NO_FLOOR, others=("fast", "slow"))
    fast, slow = cluster.others[PREFILL]
    fast.page_s, slow.page_s = PAGE_S / 4, 3 * PAGE_S
    run(cluster)
    [link] = cluster.links
    assert chosen(cluster) == ("fast", ["fake", "slow"])
    assert [figures.latency_s for figures in (link, *link.others)] == pytest.approx([PAGE_S / 4, PAGE_S, 3 * PAGE_S])
    assert [figures.gbps for figures in (link, *link.others)] == pytest.approx([4 * gbps(cluster), gbps(cluster), gbps(cluster) / 3])
    measured = [record.getMessage() for record in caplog.records if "GB/s" in record.getMessage()]
    assert len(measured) == 1
    assert all(name in measured[0] for name in ("over fast", "fake", "slow"))
    assert transport_of(cluster) == "fast"
    run(cluster, 2 * REPEAT_S)
    assert len(cluster.links) == 1, "measured anew for no reason"
    cluster.assert_nothing_leaked()


def test_the_specs_order_decides_between_transports_that_are_about_as_fast() -> None:
    cluster = FakeCluster(floor=NO_FLOOR, others=("other",))
    cluster.others[PREFILL][0].page_s = 0.95 * PAGE_S
    run(cluster)
    assert chosen(cluster) == ("fake", ["other"])


def test_the_floor_is_for_the_fastest() -> None:
    cluster = FakeCluster(floor=Floor(2 * gbps(FakeCluster()), refuse=True), others=("fast",))
    cluster.others[PREFILL][0].page_s = PAGE_S / 4
    run(cluster)
    assert [(link.transport, link.refused) for link in cluster.links] == [("fast", False)]


def test_a_transport_that_does_not_reach_is_passed_over_and_measured_once_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(floor=NO_FLOOR, others=("far",))
    [far] = cluster.others[PREFILL]
    far.page_s = PAGE_S / 4
    connect = far.connect
    monkeypatch.setattr(far, "connect", lambda descriptor: None)
    run(cluster, LINK_WAIT_S + 1)
    assert chosen(cluster) == ("fake", [])
    assert transport_of(cluster) == "fake"
    monkeypatch.setattr(far, "connect", connect)
    run(cluster, REPEAT_S)
    assert chosen(cluster) == ("far", ["fake"])
    assert transport_of(cluster) == "far"
    cluster.assert_nothing_leaked()


def test_a_fall_back_is_measured_and_so_is_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(floor=NO_FLOOR, others=("fast",))
    [fast] = cluster.others[PREFILL]
    fast.page_s = PAGE_S / 4
    run(cluster)
    assert chosen(cluster) == ("fast", ["fake"])
    connect = fast.connect

    def refuse(descriptor: MemoryDescriptor) -> Peer:
        raise PeerGone("cut")

    monkeypatch.setattr(fast, "connect", refuse)
    run(cluster)
    assert chosen(cluster) == ("fake", [])
    assert transport_of(cluster) == "fake"
    monkeypatch.setattr(fast, "connect", connect)
    run(cluster, REPEAT_S)
    assert chosen(cluster) == ("fast", ["fake"])
    assert transport_of(cluster) == "fast"
    cluster.assert_nothing_leaked()


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_nothing_leaks_over_two_transports(seed: int) -> None:
    """One of them comes and goes; messages are lost, and both sides die."""
    choose = random.Random(seed)
    cluster = FakeCluster(floor=NO_FLOOR, others=("other",))
    for _ in range(choose.randrange(200)):
        weights = {"turn": 40, "deliver": 40, "drop": 2, "land": 15, "time": 1, "kill": 1, "cut": 2, "submit": 2}
        if happen(cluster, choose, weights, pauses=(0.1, LINK_WAIT_S, TIMEOUT_S + 0.1)) == "cut":
            other = cluster.others[PREFILL][0]
            other.connect = choose.choice([lambda descriptor: None, partial(FakeTransport.connect, other)])
    other = cluster.others[PREFILL][0]
    other.connect = partial(FakeTransport.connect, other)
    end_of_faults(cluster)
    assert chosen(cluster) == ("fake", ["other"])


@needs_ucx
def test_processes_measure_all_transports_and_use_the_fastest() -> None:
    """Pages of a few bytes: which one that is depends on the machine."""
    with process_cluster("shm,ucx", "prefill-0", "decode-0", probe_links=True) as cluster:
        cluster.pump(lambda: len(cluster.links) == 1, 20.0)
        [link] = cluster.links
        cluster.submit(PROMPT, max_tokens=5)
        cluster.finish(20.0)
        cluster.assert_whole()
    figures = [link, *link.others]
    assert sorted(each.transport for each in figures) == ["shm", "ucx"]
    assert all(each.gbps > 0 and 0 < each.latency_s < 1 for each in figures)
    assert link.gbps >= AS_FAST * max(each.gbps for each in figures)
