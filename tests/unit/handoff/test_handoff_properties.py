"""Drives real workers through faults of every kind on a virtual clock.

After any history: no wrong token, no leaked block, every request ended.

A history is a seeded stream of weighted events: mostly progress (so that handoffs get deep into every state), a few of them faults.
"""

import random
from collections.abc import Callable

import pytest
from harness.fake_cluster import BLOCK_SIZE, TIMEOUT_S, FakeCluster
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.kvtransfer.fake import FakeTransport
from diptych.messages.codec import Message
from diptych.messages.fake_post import FakePost
from diptych.messages.handoff import KVAccept, KVCancel, KVCommitted, KVDrained, KVLanded, RefuseReason, Ticket
from diptych.messages.ids import BlockId, Epoch, Imm, RequestId, WorkerId
from diptych.messages.requests import TokenDelta

PREFIX = list(range(100, 116))
WORKERS = [WorkerId(name) for name in ("prefill-0", "prefill-1", "decode-0", "decode-1")]
BLOCK_SIZES = [BLOCK_SIZE, 8, BLOCK_SIZE, 3]
"""Of prefill workers; others than BLOCK_SIZE are converted."""

TPS = [None, (1, 2), (2, 1), (2, 2), (2, 4), (4, 2)]
"""Ranks of prefill workers, of decode workers."""

PROGRESS = {"submit": 6, "turn": 30, "deliver": 40, "land": 16, "undisturbed": 2}
FAULTS = {
    "drop": 2, "double": 3, "abort": 3, "wait_a_little": 1, "wait_for_deadlines": 0.4, "kill": 0.4, "kill_unseen": 0.4, "forge": 2,
    "keep_news_back": 0.4, "cut_a_link": 1, "deafen_a_fence": 0.2,
}  # fmt: skip


class History:
    """Events on a cluster, drawn with one seed."""

    def __init__(
        self, seed: int, faults: dict[str, float], prefill_block_size: int = BLOCK_SIZE, tps: tuple[int, int] | None = None
    ) -> None:
        self.random = random.Random(seed)
        sizes = {"num_prefill": 2, "num_decode": 2, "num_blocks": 14, "prefill_block_size": prefill_block_size}
        self.cluster = FakeCluster(**sizes, tps=tps, gathers=self.random.random() < 0.5)
        weights = PROGRESS | faults
        self.events: list[Callable[[], None]] = [getattr(self, name) for name in weights]
        self.weights = list(weights.values())

    def run(self, num_events: int) -> None:
        for event in self.random.choices(self.events, self.weights, k=num_events):
            event()
            for worker in self.cluster.workers.values():
                pool = worker.engine.pool
                assert pool.num_free + pool.num_cached + pool.num_held == pool.num_blocks

    def finish(self) -> None:
        """No more faults. What messages were lost for ends by its deadline or by its client's patience."""
        self.cluster.tell_late_news()
        self.cluster.fabric.mend()
        for name in WORKERS:
            for transport in self.cluster.transports_of(name):
                transport.fences = True
        for pause in (0.0, TIMEOUT_S + 1, 200.0):
            self.cluster.now += pause
            self.cluster.settle()
            self.cluster.give_up_unanswered()
            self.cluster.settle()
        assert all(answer.ended for answer in self.cluster.answers.values())
        self.cluster.assert_nothing_leaked()

    # progress

    def submit(self) -> None:
        if sum(not a.ended for a in self.cluster.answers.values()) < 8:
            shared, own = self.random.choice([0, 5, 8, 16]), [self.random.randrange(900) for _ in range(self.random.randint(1, 12))]
            prefill = self.random.choice(["prefill-0", "prefill-1", "prefill-0", None, None])
            by_itself = ["prefill-0"] if prefill is None else []
            decode = self.random.choice(["decode-0", "decode-1", *by_itself])
            self.cluster.submit(PREFIX[:shared] + own, self.random.randint(1, 6), prefill, decode)

    def turn(self) -> None:
        self.cluster.turn(self.random.choice(WORKERS))

    def deliver(self) -> None:
        self._in_flight(self.cluster.network.deliver)

    def land(self) -> None:
        if self.cluster.fabric.in_flight:
            self.cluster.fabric.land(self.random.randrange(len(self.cluster.fabric.in_flight)))

    def undisturbed(self) -> None:
        for _ in range(3):
            self.cluster.network.deliver_all()
            self.cluster.fabric.land_all()
            self.cluster.turn()

    # faults

    def drop(self) -> None:
        self._in_flight(self.cluster.network.drop)

    def double(self) -> None:
        self._in_flight(self.cluster.network.double)

    def _in_flight(self, act: Callable[[int], object]) -> None:
        if self.cluster.network.in_flight:
            act(self.random.randrange(len(self.cluster.network.in_flight)))

    def abort(self) -> None:
        live = [a for a in self.cluster.answers.values() if not a.ended]
        if live:
            self.cluster.abort(self.random.choice(live))

    def wait_a_little(self) -> None:
        self.cluster.now += TIMEOUT_S / 3

    def wait_for_deadlines(self) -> None:
        self.cluster.now += self.random.choice([TIMEOUT_S + 0.1, 120.0])

    def kill(self) -> None:
        which = self.random.choice(WORKERS)
        self.cluster.kill(which)
        self.cluster.publish()
        self.cluster.restart(which)

    def kill_unseen(self) -> None:
        """The others learn of the death and of the successor from one snapshot."""
        which = self.random.choice(WORKERS)
        self.cluster.kill(which)
        self.cluster.restart(which)

    def keep_news_back(self) -> None:
        """Somebody hears of a death and of the successor later than all others."""
        if self.cluster.uninformed:
            self.cluster.tell_late_news()
        else:
            self.cluster.uninformed = {self.random.choice(WORKERS)}
            self.kill_unseen()

    def cut_a_link(self) -> None:
        """Between two that live. What was under way is lost or lands late; nobody knows which before the link is there again."""
        fabric = self.cluster.fabric
        if fabric.cut:
            fabric.mend()
        else:
            writer, receiver = (self._any_transport(names).location for names in (WORKERS[:2], WORKERS[2:]))
            fabric.cut.add((writer, receiver))

    def deafen_a_fence(self) -> None:
        transport = self._any_transport(WORKERS[2:])
        transport.fences = not transport.fences

    def _any_transport(self, names: list[WorkerId]) -> FakeTransport:
        """Of any rank."""
        return self.random.choice(self.cluster.transports_of(self.random.choice(names)))

    def forge(self) -> None:
        """A message with a ticket that nobody gave out: of a live request, an unknown one, an epoch long gone."""
        number = self.random.randint(1, max(1, len(self.cluster.answers)))
        decode = self.random.choice(["decode-0", "decode-1"])
        epoch = self.random.choice([Epoch(1), self.cluster.workers[WorkerId(decode)].ref.epoch])
        ticket = Ticket(WorkerId(decode), epoch, RequestId(f"r{number}"), self.random.randrange(4))
        forged = self.random.choice(
            [
                KVAccept(ticket, 0, (BlockId(0), BlockId(1)), Imm(0)),
                KVLanded(ticket, self.cluster.workers[WORKERS[0]].ref, 4, TokenDelta(ticket.request_id, 0, (1,))),
                KVCommitted(ticket),
                KVDrained(ticket),
                KVCancel(ticket, RefuseReason.ABORTED),
            ]
        )
        self.cluster.gateway.send(self.cluster.workers[self.random.choice(WORKERS)].post.address, forged)


@settings(max_examples=120)
@given(seed=st.integers(0, 2**32), prefill_block_size=st.sampled_from(BLOCK_SIZES), tps=st.sampled_from(TPS))
def test_any_mix_of_faults(seed: int, prefill_block_size: int, tps: tuple[int, int] | None) -> None:
    history = History(seed, FAULTS, prefill_block_size, tps)
    history.run(400)
    history.finish()


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_alone(fault: str) -> None:
    """Histories long enough, and the fault frequent enough, that it strikes in every state; on a fast and on a very slow link."""
    for seed in range(16):
        weights = {fault: FAULTS[fault] * 3, "land": (16, 0.7)[seed % 2]}
        history = History(seed, weights, BLOCK_SIZES[seed // 2 % len(BLOCK_SIZES)], TPS[seed // 3 % len(TPS)])
        history.run(500)
        history.finish()


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_what_arrives_between_the_layers_of_a_step(seed: int) -> None:
    """Handoff messages are read there too: refusals, cancels and accepts for sequences that are being computed."""
    history = History(seed, FAULTS)
    network, receive = history.cluster.network, FakePost.receive

    def restless(post: FakePost, timeout_s: float) -> list[Message]:
        for letter in [letter for letter in network.in_flight if letter.to == post.address and history.random.random() < 0.5]:
            network.deliver(network.in_flight.index(letter))
        return receive(post, timeout_s)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakePost, "receive", restless)
        history.run(400)
        history.finish()


def test_reordering_alone_never_fails_a_request() -> None:
    """Messages and pages in any order, none lost: every request is answered in full."""
    for seed in range(40):
        history = History(seed, {}, BLOCK_SIZES[seed % len(BLOCK_SIZES)], TPS[seed % len(TPS)])
        history.run(400)
        history.cluster.settle()
        answers = history.cluster.answers.values()
        assert all(answer.complete for answer in answers), [a.failure for a in answers if not a.complete]
        history.finish()
