"""What a dead writer has sent may still be under way: its blocks are used again only after the transport has fenced it."""

import pytest
from harness.fake_cluster import TIMEOUT_S, FakeCluster

from diptych.kvtransfer.transport import Peer
from diptych.messages.handoff import KVOffer, KVProbe
from diptych.messages.ids import WorkerId
from diptych.messages.membership import MemoryDescriptor
from diptych.prefill_worker.link_prober import Floor

PROMPT = list(range(20))
PREFILL, DECODE = WorkerId("prefill-0"), WorkerId("decode-0")


def killed_in_mid_transfer(cluster: FakeCluster) -> None:
    """Some pages have left and none has landed when the writer dies."""
    cluster.submit(PROMPT, max_tokens=3)
    while not cluster.fabric.in_flight:
        cluster.network.deliver_all()
        cluster.turn()
    cluster.kill(PREFILL)


def test_blocks_stay_held_until_the_fence_stands() -> None:
    cluster = FakeCluster()
    killed_in_mid_transfer(cluster)
    cluster.transports[DECODE].fences = False
    decode = cluster.workers[DECODE]
    cluster.restart(PREFILL)
    for _ in range(200):
        cluster.network.deliver_all()
        cluster.turn()
        cluster.now += 0.01
    assert decode.engine.pool.num_held == 5, "used again although the dead writer's pages may still land"
    cluster.transports[DECODE].fences = True
    cluster.settle()
    cluster.assert_nothing_leaked()
    assert cluster.submit(PROMPT, max_tokens=3)
    cluster.settle()
    assert list(cluster.answers.values())[-1].complete


def test_a_writer_that_was_never_listed_is_fenced_too() -> None:
    """Its listing and its death came between two snapshots: what to fence is known from its offer."""
    cluster = FakeCluster()
    killed_in_mid_transfer(cluster)
    in_flight = list(cluster.fabric.in_flight)
    cluster.publish()
    cluster.settle(20.0)
    assert in_flight
    assert not cluster.fabric.in_flight
    cluster.assert_nothing_leaked()


def test_a_writer_of_whom_this_worker_has_not_heard_yet_is_not_taken_for_dead() -> None:
    """News of members may be late by any time: its successor writes already, and the receiver knows the first life alone."""
    cluster = FakeCluster()
    cluster.turn()
    cluster.uninformed = {DECODE}
    cluster.kill(PREFILL)
    cluster.restart(PREFILL)
    answer = cluster.submit(PROMPT, max_tokens=3)
    while not cluster.fabric.in_flight:
        cluster.network.deliver_all()
        cluster.turn()
    cluster.abort(answer)
    for _ in range(100):                                     # its pages are still under way: it cannot say that it has stopped
        cluster.network.deliver_all()
        cluster.turn()
        cluster.now += TIMEOUT_S / 10
    assert cluster.workers[DECODE].engine.pool.num_held == 5, "used again although a living writer's pages may still land"
    cluster.settle()
    cluster.assert_nothing_leaked()


@pytest.mark.parametrize("kind", [KVOffer, KVProbe])
def test_what_a_dead_writer_asked_for_is_not_lent_when_it_comes_late(kind: type) -> None:
    cluster = FakeCluster(floor=Floor(0.0, refuse=True))
    cluster.submit(PROMPT, max_tokens=3)
    while not (asked := [letter for letter in cluster.network.in_flight if isinstance(letter.message, kind)]):
        cluster.step()
    cluster.kill(PREFILL)
    cluster.network.in_flight.clear()
    cluster.publish()
    cluster.turn()
    cluster.network.in_flight += asked
    cluster.network.deliver_all()
    cluster.turn()
    cluster.assert_nothing_leaked()
    assert not cluster.network.in_flight, "an answer to nobody"


@pytest.mark.parametrize("victim", [DECODE])
def test_a_writer_dials_what_is_listed_and_leaves_what_is_gone(victim: WorkerId, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster()
    writer, seen = cluster.transports[PREFILL], []

    def connect(descriptor: MemoryDescriptor) -> Peer:
        seen.append(("connect", descriptor.location))
        return Peer(descriptor)

    monkeypatch.setattr(writer, "connect", connect)
    monkeypatch.setattr(writer, "disconnect", lambda peer: seen.append(("disconnect", peer.descriptor.location)))
    first = cluster.transports[victim].location
    cluster.turn()
    assert seen == [("connect", first)], "not before the first handoff"
    cluster.kill(victim)
    cluster.restart(victim)
    cluster.turn()
    assert seen[1:] == [("disconnect", first), ("connect", cluster.transports[victim].location)]


def test_a_handoff_waits_for_a_link_and_then_takes_another_route(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster()
    writer = cluster.transports[PREFILL]
    connect = writer.connect
    monkeypatch.setattr(writer, "connect", lambda descriptor: None)
    late, lost = cluster.submit(PROMPT, max_tokens=3), cluster.submit([*PROMPT, 1], max_tokens=3)
    for _ in range(20):
        cluster.network.deliver_all()
        cluster.turn()
        cluster.now += 0.05
    assert late.failure is None
    monkeypatch.setattr(writer, "connect", connect)
    cluster.settle()
    assert late.complete
    assert lost.complete
    monkeypatch.setattr(writer, "connect", lambda descriptor: None)
    lost = cluster.submit([*PROMPT, 2], max_tokens=3)
    cluster.settle()
    assert lost.failure is not None
    assert "no link for 2.0 s" in lost.failure.message
    assert [(f.worker.worker_id, f.decode_id, f.transport) for f in cluster.transfer_failures] == [(PREFILL, DECODE, "none")]
    cluster.assert_nothing_leaked()
