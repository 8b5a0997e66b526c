"""A handoff that was accepted late is announced before its pages leave, and its short waits are not slept through."""

from typing import Any

import pytest
from harness.fake_cluster import Answer, FakeCluster

from diptych.decode_worker.kv_receiver import PAGES_ATTENTION_S
from diptych.decode_worker.worker import ROUSE_PERIOD_S
from diptych.engine.worker import ALERT_S, ATTENTION_S, Worker
from diptych.messages.errors import PeerGone
from diptych.messages.handoff import KVAccept, KVLanded, KVOffer
from diptych.messages.ids import WorkerId

PREFILL, DECODE = WorkerId("prefill-0"), WorkerId("decode-0")
PROMPT = list(range(20))


def accept_late(cluster: FakeCluster) -> Answer:
    """Until the accept waits in the mailbox of a writer that has computed everything."""
    answer = cluster.submit(PROMPT, max_tokens=3)
    while not answer.tokens:
        deliver_all_but_offers(cluster)
        cluster.turn(PREFILL)
    cluster.network.deliver_all()
    cluster.turn(DECODE)
    assert [type(letter.message) for letter in cluster.network.in_flight if letter.to != cluster.gateway.address] == [KVAccept]
    cluster.network.deliver_all()
    return answer


def deliver_all_but_offers(cluster: FakeCluster) -> None:
    while letters := [i for i, letter in enumerate(cluster.network.in_flight) if not isinstance(letter.message, KVOffer)]:
        cluster.network.deliver(letters[0])


def test_the_announcement_is_on_its_way_while_the_writes_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster()
    transport, before = cluster.transports[PREFILL], list[list[type]]()
    write = transport.write_pages

    def watch(*arguments: Any) -> None:
        before.append([type(letter.message) for letter in cluster.network.in_flight])
        write(*arguments)

    monkeypatch.setattr(transport, "write_pages", watch)
    answer = accept_late(cluster)
    cluster.turn(PREFILL)
    assert [KVLanded in sent for sent in before] == [True]
    cluster.settle()
    assert answer.complete
    cluster.assert_nothing_leaked()


@pytest.mark.parametrize("landed_first", [True, False])
def test_announced_pages_that_never_leave_are_no_kv(monkeypatch: pytest.MonkeyPatch, landed_first: bool) -> None:
    cluster = FakeCluster()

    def refuse(*_: object) -> None:
        raise PeerGone("the link is down")

    monkeypatch.setattr(cluster.transports[PREFILL], "write_pages", refuse)
    answer = accept_late(cluster)
    cluster.turn(PREFILL)
    if not landed_first:
        cluster.network.in_flight.reverse()
    cluster.settle()
    assert answer.failure is not None
    assert answer.failure.retryable
    assert list(answer.tokens) == [0], "decoded from KV that did not come"
    cluster.assert_nothing_leaked()


@pytest.fixture
def offered() -> FakeCluster:
    """The offer is on its way, and the prompt has been computed."""
    cluster = FakeCluster()
    answer = cluster.submit(PROMPT, max_tokens=3)
    while not answer.tokens:
        deliver_all_but_offers(cluster)
        cluster.turn(PREFILL)
    return cluster


def waits_s(cluster: FakeCluster, worker: Worker, attention_s: float = ATTENTION_S) -> list[float]:
    """Now, and when the time for attention is over."""
    began, waits = cluster.now, []
    for cluster.now in (began, began + attention_s + 1e-6):
        waits.append(worker.idle_wait_s())
    cluster.now = began
    return waits


def test_a_writer_looks_for_the_answer_to_its_offer_but_not_for_long(offered: FakeCluster) -> None:
    writer = offered.workers[PREFILL]
    attentive_s, later_s = waits_s(offered, writer)
    assert attentive_s == 0.0
    assert later_s > 0.0
    offered.network.deliver_all()
    offered.turn(DECODE)
    offered.network.deliver_all()
    offered.turn(PREFILL)
    assert waits_s(offered, writer)[0] > 0.0, "it has its answer"


def test_a_receiver_looks_for_the_announcement_but_not_for_long(offered: FakeCluster) -> None:
    receiver = offered.workers[DECODE]
    offered.turn(DECODE)
    assert waits_s(offered, receiver)[0] > 0.0, "nobody has asked"
    offered.network.deliver_all()
    offered.turn(DECODE)
    attentive_s, later_s = waits_s(offered, receiver)
    assert attentive_s == 0.0
    assert later_s > 0.0


def test_a_gpus_worker_stays_awake_after_a_message_and_after_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster()
    worker = cluster.workers[PREFILL]
    assert worker._alert_s == 0.0, "its pool is on a CPU, where others need the core"
    monkeypatch.setattr(worker, "_alert_s", ALERT_S)
    worker.turn(0.0)
    assert waits_s(cluster, worker, ALERT_S)[0] > 0.0, "nothing has come"
    cluster.submit(PROMPT[:3], max_tokens=1, prefill=None, decode="prefill-0")
    cluster.network.deliver_all()
    for _ in range(2):                                       # a message; a step, unless both are of one turn
        worker.turn(0.0)
    assert not worker.engine.has_work
    alert_s, later_s = waits_s(cluster, worker, ALERT_S)
    assert (alert_s, later_s > 0.001) == (0.0, True)
    cluster.now += 2 * ALERT_S
    worker.turn(0.0)
    assert waits_s(cluster, worker, ALERT_S)[0] > 0.0, "a turn in which nothing came is none"


@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_receiver_beside_a_gpu_looks_for_pages_and_is_awake_once_some_have_come(has_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is its GPU. On a CPU others need the core."""
    cluster, roused_at = FakeCluster(), list[float]()
    receiver = cluster.workers[DECODE]
    monkeypatch.setattr(receiver.engine.runner, "runs_ahead", has_gpu)
    monkeypatch.setattr(receiver.engine.runner, "rouse", lambda: roused_at.append(cluster.now))
    answer = cluster.submit(PROMPT, max_tokens=3)
    for worker_id in (PREFILL, DECODE):                      # an offer and a step; the accept
        cluster.network.deliver_all()
        cluster.turn(worker_id)
    assert (waits_s(cluster, receiver)[1] <= 0.001) == has_gpu
    assert not roused_at, "a prompt may take seconds"
    cluster.network.deliver_all()
    cluster.turn(PREFILL)
    cluster.now += 2 * ATTENTION_S
    cluster.fabric.land_all()
    cluster.turn(DECODE)
    assert not receiver.engine.sequences, "the prompt takes another step"
    attentive_s, later_s = waits_s(cluster, receiver, PAGES_ATTENTION_S)
    assert (attentive_s == 0.0) == has_gpu
    assert later_s > 0.0
    for _ in range(10):
        cluster.turn(DECODE)
        cluster.now += ROUSE_PERIOD_S / 4
    assert len(roused_at) == (3 if has_gpu else 0), roused_at
    decoding = cluster.submit([1, 2, 3], max_tokens=8, prefill=None)
    for _ in range(4):
        cluster.network.deliver_all()
        cluster.turn(DECODE)
        cluster.now += ROUSE_PERIOD_S
    assert decoding.tokens
    assert len(roused_at) == (3 if has_gpu else 0), "it computes"
    cluster.settle()
    assert answer.complete
    cluster.turn(DECODE)
    assert waits_s(cluster, receiver)[0] > 0.001, "nothing more is to come"
