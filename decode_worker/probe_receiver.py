"""The receiver's side of link probes: lends blocks that nobody needs, counts what lands in them, takes them back.

    KVProbe ──► lent (KVProbeAccept), or BUSY ──► KVProbeSent ──► all counted: KVProbeCounted, per round ──► KVDrained: given back

Requests come first: a probe gets at most a quarter of what is free or only cached (in a pool that has served for a while nearly all of it
is), and nothing while anybody waits for memory. What is lent comes back as a handoff's blocks do: when the writer says that it has
stopped, or once it is confirmed dead and fenced.
"""

from dataclasses import dataclass

from ..engine.engine import Engine
from ..kvtransfer.layout import KVLayout
from ..kvtransfer.transport import Bundle
from ..messages.handoff import (
    KVCancel,
    KVDrained,
    KVProbe,
    KVProbeAccept,
    KVProbeCounted,
    KVProbeSent,
    KVRefuse,
    RefuseReason,
    Ticket,
)
from ..messages.ids import BlockId, Imm
from ..messages.membership import Membership
from ..messages.post import Post
from ..messages.requests import WorkerRef
from .kv_receiver import FENCE_PAUSE_S, FENCE_S, KVReceiver

MAX_SHARE = 4
"""A probe gets one of so many blocks that nobody holds."""

ProbeMessage = KVProbe | KVProbeSent | KVDrained


@dataclass(eq=False)
class Loan:
    probe: KVProbe
    blocks: list[BlockId]
    imm: Imm
    deadline: float                           # for the writer's next word; of a dead writer: for the next try to fence it
    num_announced: int = 0                    # pages, not yet confirmed; 0: none
    writer_died: bool = False


class ProbeReceiver:
    """Shares the engine's blocks and the pool's counters with the handoffs."""

    def __init__(
        self,
        me: WorkerRef,
        post: Post,
        transport: Bundle,
        engine: Engine,
        layout: KVLayout,
        handoffs: KVReceiver,
        timeout_s: float,
    ) -> None:
        self._me = me
        self._post = post
        self._transport = transport
        self._engine = engine
        self._layout, self._pieces_per_page = layout.told, layout.pieces_per_page
        self._handoffs = handoffs
        self._timeout_s = timeout_s
        self._loans: dict[Ticket, Loan] = {}
        self._membership = Membership(version=-1, workers=(), gateways=())

    def __len__(self) -> int:
        return len(self._loans)

    @property
    def is_waiting(self) -> bool:
        """Announced pages are still to be counted."""
        return any(loan.num_announced for loan in self._loans.values())

    def receive(self, message: ProbeMessage, now: float) -> None:
        loan = self._loans.get(message.ticket)
        match message:
            case KVProbe() if loan is None and not self._membership.has_ended(message.writer):
                self._asked(message, now)
            case KVProbeSent() if loan is not None and not loan.writer_died:
                loan.num_announced, loan.deadline = message.num_pages, now + self._timeout_s
                self._count(loan)
            case KVDrained() if loan is not None:
                self._take_back(loan)
            case _:
                pass                                         # doubled, late, or a handoff's

    def tick(self, now: float) -> None:
        for loan in list(self._loans.values()):
            self._count(loan)
            if now < loan.deadline:
                continue
            if loan.writer_died:
                self._writer_died(loan, now)
            else:                                            # again and again until it answers, or is confirmed dead
                loan.deadline = now + self._timeout_s
                self._post.send(loan.probe.writer.address, KVCancel(loan.probe.ticket, RefuseReason.TIMEOUT))

    def update_membership(self, membership: Membership, now: float) -> None:
        self._membership = membership
        for loan in [loan for loan in self._loans.values() if membership.has_ended(loan.probe.writer)]:
            self._writer_died(loan, now)

    def _asked(self, probe: KVProbe, now: float) -> None:
        ticket, pool = probe.ticket, self._engine.pool
        if (ticket.decode_id, ticket.decode_epoch) != (self._me.worker_id, self._me.epoch):
            self._refuse(probe, RefuseReason.STALE_EPOCH, f"this is {self._me.worker_id} epoch {self._me.epoch}")
        elif probe.layout != self._layout:
            self._refuse(probe, RefuseReason.LAYOUT, f"pages that do not fit in here: {self._layout.differences(probe.layout)}")
        else:
            count = min(max(1, probe.num_blocks), pool.num_available // MAX_SHARE)
            blocks = pool.take(count) if count and self._handoffs.imms and self._is_quiet else None
            if blocks is None:
                why = f"{pool.num_available} of {pool.num_blocks} blocks are nobody's; {len(self._loans)} other probes"
                self._refuse(probe, RefuseReason.BUSY, why)
            else:
                self._lend(probe, blocks, now)

    @property
    def _is_quiet(self) -> bool:
        return not self._loans and not self._engine.scheduler.waiting and not self._handoffs.wants_memory

    def _lend(self, probe: KVProbe, blocks: list[BlockId], now: float) -> None:
        loan = Loan(probe, blocks, self._handoffs.imms.pop(), now + self._timeout_s)
        self._loans[probe.ticket] = loan
        self._transport.reset(loan.imm)
        self._post.send(probe.writer.address, KVProbeAccept(probe.ticket, tuple(blocks), loan.imm))

    def _count(self, loan: Loan) -> None:
        if loan.num_announced and self._transport.num_landed(loan.imm) >= loan.num_announced * self._pieces_per_page:
            self._post.send(loan.probe.writer.address, KVProbeCounted(loan.probe.ticket, loan.num_announced))
            loan.num_announced = 0

    def _writer_died(self, loan: Loan, now: float) -> None:
        loan.writer_died, loan.num_announced = True, 0
        if self._transport.fence(loan.probe.descriptors, FENCE_S):
            self._take_back(loan)
        else:
            loan.deadline = now + FENCE_PAUSE_S

    def _take_back(self, loan: Loan) -> None:
        del self._loans[loan.probe.ticket]
        self._engine.pool.release(loan.blocks)
        self._handoffs.imms.append(loan.imm)

    def _refuse(self, probe: KVProbe, reason: RefuseReason, text: str) -> None:
        self._post.send(probe.writer.address, KVRefuse(probe.ticket, reason, text))
