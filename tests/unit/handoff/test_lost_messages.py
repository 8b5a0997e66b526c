"""One message of a handoff is lost each time it is sent, for long: nothing is reused too early, and nothing stays reserved for ever."""

from collections.abc import Callable

import pytest
from harness.fake_cluster import TIMEOUT_S, FakeCluster

from diptych.messages.codec import Message
from diptych.messages.handoff import KVAccept, KVCancel, KVCommitted, KVDrained, KVLanded, KVOffer, KVRefuse, RefuseReason, Ticket
from diptych.messages.ids import RequestId

PROMPT = list(range(20))


def lose(cluster: FakeCluster, lost: Callable[[Message], bool], num_rounds: int, pause_s: float = 0.01) -> None:
    for _ in range(num_rounds):
        cluster.network.in_flight = [letter for letter in cluster.network.in_flight if not lost(letter.message)]
        cluster.network.deliver_all()
        cluster.fabric.land_all()
        cluster.turn()
        cluster.now += pause_s


@pytest.mark.parametrize("kind", [KVOffer, KVAccept, KVLanded, KVCommitted])
def test_a_lost_step_ends_by_its_deadline(kind: type) -> None:
    cluster = FakeCluster()
    answer = cluster.submit(PROMPT, max_tokens=3)
    lose(cluster, lambda message: isinstance(message, kind), num_rounds=40, pause_s=TIMEOUT_S / 10)
    cluster.settle()
    cluster.give_up_unanswered()
    cluster.settle()
    assert answer.ended
    cluster.assert_nothing_leaked()


@pytest.mark.parametrize("also", [(), (KVCancel,)], ids=["drained", "drained and cancel"])
def test_blocks_stay_reserved_until_the_writer_has_said_so_however_late(also: tuple[type, ...]) -> None:
    cluster = FakeCluster()
    answer = cluster.submit(PROMPT, max_tokens=3)
    lose(cluster, lambda message: isinstance(message, KVAccept), num_rounds=4)
    decode = cluster.workers[answer.request.route.decode.worker_id]
    assert decode.engine.pool.num_held == 5
    cluster.abort(answer)
    lose(cluster, lambda message: isinstance(message, (KVDrained, *also)), num_rounds=60, pause_s=TIMEOUT_S / 4)
    assert decode.engine.pool.num_held == 5, "reused although the writer never said that it had stopped"
    lose(cluster, lambda message: False, num_rounds=30, pause_s=TIMEOUT_S / 4)
    cluster.assert_nothing_leaked()


def test_a_ticket_of_another_request_is_refused() -> None:
    """Or its sequence would take another one's place in the books, and that one's blocks would leak."""
    cluster = FakeCluster()
    answer = cluster.submit(PROMPT, max_tokens=3)
    offers: list[KVOffer] = []
    while not offers:
        offers = [letter.message for letter in cluster.network.in_flight if isinstance(letter.message, KVOffer)]
        if not offers:
            cluster.network.deliver_all()
            cluster.turn()
    ticket = Ticket(offers[0].ticket.decode_id, offers[0].ticket.decode_epoch, RequestId("other"), 1)
    forged = KVOffer(ticket, offers[0].writer, offers[0].layout_hash, offers[0].request, offers[0].block_hashes, offers[0].num_blocks)
    cluster.gateway.send(answer.request.route.decode.address, forged)
    cluster.network.deliver_all()
    cluster.turn()
    refusals = [letter.message for letter in cluster.network.in_flight if isinstance(letter.message, KVRefuse)]
    assert [(refusal.ticket, refusal.reason) for refusal in refusals] == [(ticket, RefuseReason.MALFORMED)]
    cluster.settle()
    assert answer.complete
    cluster.assert_nothing_leaked()
