"""One message of a handoff is lost each time it is sent, for long: nothing is reused too early, and nothing stays reserved for ever."""

from collections.abc import Callable
from typing import TypeVar

import msgspec
import pytest
from harness.fake_cluster import PAGE_S, TIMEOUT_S, FakeCluster

from diptych.kvtransfer.fake import FakeTransport
from diptych.kvtransfer.transport import NUM_IMMS
from diptych.messages.codec import Message
from diptych.messages.handoff import KVAccept, KVCancel, KVCommitted, KVDrained, KVLanded, KVOffer, KVRefuse, RefuseReason, Ticket
from diptych.messages.ids import BlockId, Imm, RequestId, WorkerId
from diptych.messages.requests import FailureKind

PROMPT = list(range(20))
T = TypeVar("T")


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


def wait_for(cluster: FakeCluster, kind: type[T]) -> T:
    """The first such message on its way, which is where it stays; all others are delivered."""
    while True:
        for letter in cluster.network.in_flight:
            if isinstance(message := letter.message, kind):
                return message
        cluster.network.deliver_all()
        cluster.turn()


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
    forged = KVOffer(ticket, offers[0].writer, offers[0].layout, offers[0].request)
    cluster.gateway.send(answer.request.route.decode.address, forged)
    cluster.network.deliver_all()
    cluster.turn()
    refusals = [letter.message for letter in cluster.network.in_flight if isinstance(letter.message, KVRefuse)]
    assert [(refusal.ticket, refusal.reason) for refusal in refusals] == [(ticket, RefuseReason.MALFORMED)]
    cluster.settle()
    assert answer.complete
    cluster.assert_nothing_leaked()


def test_a_layout_that_does_not_fit_is_refused_with_what_differs() -> None:
    """Also one whose pages are as large: heads for tokens, another model's weights."""
    cluster = FakeCluster()
    answer = cluster.submit(PROMPT, max_tokens=3)
    offer = wait_for(cluster, KVOffer)
    cluster.network.in_flight.clear()
    other = msgspec.structs.replace(offer.layout, model="another", num_kv_heads=4, block_size=1)
    cluster.gateway.send(answer.request.route.decode.address, msgspec.structs.replace(offer, layout=other))
    cluster.settle()
    assert answer.failure is not None
    assert (answer.failure.kind, answer.failure.retryable) == (FailureKind.INVALID, False)
    assert "model fake, there another; num_kv_heads 1, there 4; block_size 4, there 1" in answer.failure.message
    assert sum(cluster.fabric.counters[cluster.transports[WorkerId("decode-0")].location]) == 0, "pages were moved all the same"
    cluster.assert_nothing_leaked()


@pytest.mark.parametrize("token", [-1, 2**31, 2**64 - 1])
def test_a_token_that_cannot_be_is_refused_and_harms_nobody(token: int) -> None:
    """Blocks are hashed as 64-bit numbers."""
    cluster = FakeCluster()
    answer = cluster.submit(PROMPT, max_tokens=3)
    offer = wait_for(cluster, KVOffer)
    request = msgspec.structs.replace(offer.request, token_ids=(*PROMPT[1:], token), request_id=RequestId("other"))
    forged = msgspec.structs.replace(offer, ticket=msgspec.structs.replace(offer.ticket, request_id=request.request_id), request=request)
    cluster.gateway.send(answer.request.route.decode.address, forged)
    assert wait_for(cluster, KVRefuse).reason is RefuseReason.MALFORMED
    cluster.settle()
    assert answer.complete
    cluster.assert_nothing_leaked()


@pytest.mark.parametrize("imm", [-1, NUM_IMMS])
def test_a_counter_that_cannot_be_never_reaches_the_transport(imm: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transports keep books by counter, the one of ucx in C: that is no place to find out."""
    cluster = FakeCluster()
    answer = cluster.submit(PROMPT, max_tokens=3)
    accept = wait_for(cluster, KVAccept)
    cluster.network.in_flight.clear()
    cluster.gateway.send(answer.request.route.first.address, msgspec.structs.replace(accept, imm=Imm(imm)))
    asked: list[int] = []
    for name in ("write_pages", "stop", "busy_s"):
        monkeypatch.setattr(FakeTransport, name, lambda *arguments: asked.append(imm) or True)
    cluster.network.deliver_all()
    cluster.turn()
    monkeypatch.undo()
    cluster.settle()
    assert asked == []
    assert answer.failure is not None
    assert f"counter {imm} of {NUM_IMMS}" in answer.failure.message
    cluster.assert_nothing_leaked()


@pytest.mark.parametrize("block", [16, 2**63])
def test_blocks_that_the_receiver_does_not_have_end_the_handoff_and_not_the_writer(block: int) -> None:
    cluster = FakeCluster(num_blocks=16)
    answer = cluster.submit(PROMPT, max_tokens=3)
    accept = wait_for(cluster, KVAccept)
    cluster.network.in_flight.clear()
    wrong = msgspec.structs.replace(accept, block_ids=(*accept.block_ids[:-1], BlockId(block)))
    cluster.gateway.send(answer.request.route.first.address, wrong)
    cluster.settle()
    assert answer.failure is not None
    assert f"accepted with block {block} of 16" in answer.failure.message
    cluster.assert_nothing_leaked()


def test_a_prompt_that_leaves_no_token_to_decode_is_refused() -> None:
    """A prefill worker may take longer contexts than this one, whose block tables end at its own."""
    cluster = FakeCluster(num_blocks=8)
    decode = cluster.workers[WorkerId("decode-0")]
    cluster.submit(PROMPT, max_tokens=3)
    offer = wait_for(cluster, KVOffer)
    cluster.network.in_flight.clear()
    for num_tokens, fits in ((32, False), (31, True)):
        request = msgspec.structs.replace(offer.request, token_ids=tuple(range(num_tokens)), request_id=RequestId(f"of {num_tokens}"))
        ticket = msgspec.structs.replace(offer.ticket, request_id=request.request_id)
        longer = msgspec.structs.replace(offer, ticket=ticket, request=request)
        cluster.gateway.send(decode.post.address, longer)
        cluster.network.deliver_all()
        cluster.turn(WorkerId("decode-0"))
        answers = [letter.message for letter in cluster.network.in_flight if isinstance(letter.message, KVAccept | KVRefuse)]
        assert [isinstance(each, KVAccept) for each in answers] == [fits]
        if not fits:
            assert answers[0].reason is RefuseReason.TOO_LARGE
            assert "32 tokens" in answers[0].message
        cluster.network.in_flight.clear()


def test_a_request_that_comes_twice_does_not_end_its_handoff_twice() -> None:
    """Or the second would take the first one's place in the writer's books while pages of the first are still on their way."""
    cluster = FakeCluster()
    answer = cluster.submit(PROMPT, max_tokens=3)
    while not cluster.fabric.in_flight:
        cluster.network.deliver_all()
        cluster.turn()
    cluster.abort(answer)
    cluster.network.deliver_all()
    cluster.turn()
    prefill, decode = (cluster.workers[WorkerId(name)] for name in ("prefill-0", "decode-0"))
    assert (prefill.num_handoffs(), decode.engine.pool.num_held) == (1, 5)
    cluster.gateway.send(prefill.post.address, answer.request)
    for _ in range(300):                                     # the pages do not land, and every deadline passes
        cluster.network.deliver_all()
        cluster.turn()
        cluster.now += TIMEOUT_S / 20
    assert decode.engine.pool.num_held == 5, "reused although pages of the first are still on their way"
    cluster.settle(20.0)
    cluster.assert_nothing_leaked()


def test_what_a_counter_was_busy_with_before_is_no_part_of_a_handoffs_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handoff may be committed before its writer's transport has noticed that all is there; the next one may get the same counter."""
    cluster = FakeCluster()
    writer = cluster.transports[WorkerId("prefill-0")]
    writer.page_s = PAGE_S
    monkeypatch.setattr(writer, "stop", lambda peer, imm, timeout_s: False)
    for first in range(3):
        assert cluster.submit([first, *PROMPT], max_tokens=3)
        cluster.settle()
    assert [answer.complete for answer in cluster.answers.values()] == [True] * 3
    assert [span.transfer_s for span in cluster.spans] == pytest.approx([span.num_pages * PAGE_S for span in cluster.spans])
    cluster.assert_nothing_leaked()
