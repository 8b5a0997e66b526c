"""The receiver's side of all handoffs of one decode worker: admission, counting, commit.

    KVOffer ──► checked ──► blocks reserved ──► KVAccept ──► pages counted ──► KVLanded: announced = counted? ──► commit, KVCommitted
                   │ no memory: KVWait, the most urgent is served first
    any abort, deadline or cancel: CANCELLING; the reserved blocks stay reserved until KVDrained, or until the writer is confirmed dead
    and the transport has fenced it: what a dead process has sent may still be under way
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from ..engine.block_pool import chain_hashes
from ..engine.engine import Engine
from ..engine.sequence import tokens_of
from ..engine.urgency import due_in_s
from ..engine.worker import ATTENTION_S
from ..kvtransfer.session import HandoffState, Session
from ..kvtransfer.transport import Bundle, KVMemory
from ..messages.handoff import (
    KVAccept,
    KVCancel,
    KVCommitted,
    KVDrained,
    KVLanded,
    KVOffer,
    KVRefuse,
    KVWait,
    RefuseReason,
    Ticket,
)
from ..messages.ids import BlockHash, BlockId, Imm, RequestId
from ..messages.membership import Membership
from ..messages.post import Post
from ..messages.requests import FailureKind, GenerateRequest, TokenDelta, WorkerRef
from .admission import has_room

MAX_REMEMBERED_TICKETS = 65_536
MAX_TOKEN_ID = 2**31 - 1
FENCE_S, FENCE_PAUSE_S = 0.05, 0.5        # the engine waits for a fence so long; the next try comes after the pause
PAGES_ATTENTION_S = 0.03
"""Of groups of layers: an eighth of a step of 8192 tokens takes an H200 26 ms."""

ReceiverMessage = KVOffer | KVLanded | KVDrained


@dataclass(eq=False)
class Incoming:
    session: Session
    offer: KVOffer
    offered_at: float
    token_ids: list[int]                                     # to be the sequence's
    hashes: list[BlockHash]                                  # of the prompt's full blocks
    blocks: list[BlockId] = field(default_factory=list)      # all of the prompt's, cached prefix first; held
    num_cached: int = 0
    imm: Imm | None = None
    num_seen: int = 0                                        # counted when last looked: pages, or pieces of them
    seen_at: float = -math.inf                               # when that had grown
    landed: KVLanded | None = None
    cancel: KVCancel | None = None                           # what the writer was told; again and again until it answers
    writer_died: bool = False                                # and is still to be fenced

    @property
    def ticket(self) -> Ticket:
        return self.session.ticket

    @property
    def request(self) -> GenerateRequest:
        return self.offer.request

    @property
    def due_at(self) -> float:
        request = self.request
        slack_s = math.inf if request.ttft_slo_s is None else request.ttft_slo_s
        return self.offered_at + due_in_s(request.service_class, slack_s, request.waited_s)


class KVReceiver:
    """`on_failure(request, kind, text)` is called for a handoff that this side gives up."""

    def __init__(
        self,
        me: WorkerRef,
        post: Post,
        transport: Bundle,
        pool: KVMemory,
        engine: Engine,
        timeout_s: float,
        on_failure: Callable[[GenerateRequest, FailureKind, str], None],
    ) -> None:
        self._me = me
        self._post = post
        self._transport = transport
        self._layout, self._pieces_per_page = pool.layout.told, pool.layout.pieces_per_page
        self._engine = engine
        self._timeout_s = timeout_s
        self._on_failure = on_failure
        self._handoffs: dict[RequestId, Incoming] = {}       # in order of arrival
        self.imms = [Imm(i) for i in range(transport.num_imms)]        # not in use; shared with the probes
        self._consumed: OrderedDict[Ticket, None] = OrderedDict()
        self._membership = Membership(version=-1, workers=(), gateways=())
        self.draining = False

    def __len__(self) -> int:
        return len(self._handoffs)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._handoffs

    @property
    def is_waiting(self) -> bool:
        """Announced pages are still to be counted."""
        return any(h.landed is not None for h in self._handoffs.values())

    def expects_announcement(self, now: float) -> bool:
        """An offer has just been accepted: a short prompt may be there already."""
        return any(h.session.live and h.imm is not None and now < h.offered_at + ATTENTION_S for h in self._handoffs.values())

    @property
    def expects_pages(self) -> bool:
        return any(h.session.live and h.imm is not None for h in self._handoffs.values())

    def is_receiving(self, now: float) -> bool:
        """Pages have just come: the next ones, or the announcement, are not far."""
        return any(h.session.live and now < h.seen_at + PAGES_ATTENTION_S for h in self._handoffs.values())

    @property
    def wants_memory(self) -> bool:
        """An offer waits for blocks."""
        return any(h.session.state is HandoffState.OFFERED for h in self._handoffs.values())

    @property
    def requests(self) -> list[GenerateRequest]:
        return [handoff.request for handoff in self._handoffs.values()]

    # what the writer tells

    def receive(self, message: ReceiverMessage, now: float) -> None:
        match message:
            case KVOffer():
                self._offered(message, now)
            case KVLanded():
                self._announced(message, now)
            case KVDrained():
                self._drained(message)

    def _offered(self, offer: KVOffer, now: float) -> None:
        if self._membership.has_ended(offer.writer):
            return                                           # nobody would ever write, or say that it has stopped
        known = self._handoffs.get(offer.ticket.request_id)
        if known is not None and known.ticket == offer.ticket:
            return                                           # doubled on the way
        refusal = self._why_refused(offer)
        if refusal is not None:
            self._refuse(offer.writer, offer.ticket, *refusal)
            return
        hashes = chain_hashes(offer.request.token_ids, self._layout.block_size)
        handoff = Incoming(Session(offer.ticket, now + offer.request.timeout_s), offer, now, tokens_of(offer.request), hashes)
        self._handoffs[offer.ticket.request_id] = handoff
        if not self._reserve_next(now, handoff):
            self._post.send(offer.writer.address, KVWait(offer.ticket))

    def _why_refused(self, offer: KVOffer) -> tuple[RefuseReason, str] | None:
        ticket, num_tokens = offer.ticket, len(offer.request.token_ids)
        if (ticket.decode_id, ticket.decode_epoch) != (self._me.worker_id, self._me.epoch):
            mine = f"{self._me.worker_id} epoch {self._me.epoch}"
            return RefuseReason.STALE_EPOCH, f"for {ticket.decode_id} epoch {ticket.decode_epoch}, this is {mine}"
        if ticket in self._consumed:
            return RefuseReason.CONSUMED_TICKET, f"the handoff of {ticket.request_id} has ended here"
        if ticket.request_id != offer.request.request_id:
            return RefuseReason.MALFORMED, f"a ticket of {ticket.request_id} for {offer.request.request_id}"
        if ticket.request_id in self._handoffs or self._engine.find(ticket.request_id) is not None:
            return RefuseReason.MALFORMED, f"{ticket.request_id} is here already, under another ticket"
        if offer.layout != self._layout:
            return RefuseReason.LAYOUT, f"pages that do not fit in here: {self._layout.differences(offer.layout)}"
        if not 0 < num_tokens < self._engine.limits.max_model_len:         # one more is to be decoded
            return RefuseReason.TOO_LARGE, f"{num_tokens} tokens and the next; this worker takes up to {self._engine.limits.max_model_len}"
        least, most = min(offer.request.token_ids), max(offer.request.token_ids)
        if least < 0 or most > MAX_TOKEN_ID:
            return RefuseReason.MALFORMED, f"token ids from {least} to {most}"
        if self.draining:
            return RefuseReason.DRAINING, f"{self._me.worker_id} is draining"
        return None

    def _announced(self, landed: KVLanded, now: float) -> None:
        handoff = self._handoffs.get(landed.ticket.request_id)
        if handoff is None or handoff.ticket != landed.ticket:
            consumed = landed.ticket in self._consumed
            reason = RefuseReason.CONSUMED_TICKET if consumed else RefuseReason.UNKNOWN_TICKET
            self._refuse(landed.writer, landed.ticket, reason, f"no handoff of {landed.ticket.request_id} is under way here")
            return
        if handoff.landed is not None or handoff.session.state not in (HandoffState.RESERVED, HandoffState.MOVING):
            return
        wrong = self._what_is_wrong(landed, handoff)
        if wrong is not None:
            self._cancel(handoff, RefuseReason.PAGE_COUNT, FailureKind.INTERNAL, wrong)
            return
        handoff.landed = landed
        handoff.session.deadline = now + self._timeout_s
        self._count(handoff, now)

    def _what_is_wrong(self, landed: KVLanded, handoff: Incoming) -> str | None:
        num_pages = (len(handoff.blocks) - handoff.num_cached) * self._layout.num_layers
        if landed.num_pages != num_pages:
            return f"{landed.num_pages} pages announced, {num_pages} reserved"
        if len(landed.first.token_ids) != 1 or landed.first.finish is not None:
            return f"{len(landed.first.token_ids)} first tokens, finish {landed.first.finish}"
        return None

    def _drained(self, message: KVDrained) -> None:
        handoff = self._handoffs.get(message.ticket.request_id)
        if handoff is None or handoff.ticket != message.ticket:
            return
        if handoff.session.live:                             # the writer gave up, and tells the gateway itself
            handoff.session.move(HandoffState.CANCELLING)
        self._end(handoff, HandoffState.CANCELLED)

    # what the worker's loop tells

    def tick(self, now: float) -> None:
        for handoff in list(self._handoffs.values()):
            if handoff.session.state in (HandoffState.RESERVED, HandoffState.MOVING):
                self._count(handoff, now)
            if handoff.writer_died:
                if now >= handoff.session.deadline:
                    self._fence(handoff, now)
            elif handoff.cancel is not None and now >= handoff.session.deadline:
                handoff.session.deadline = now + self._timeout_s
                self._post.send(handoff.offer.writer.address, handoff.cancel)
            elif handoff.session.live and now >= handoff.session.deadline:
                where = f"in {handoff.session.state.name} after {self._as_pages(handoff.num_seen)}"
                text = f"{handoff.offer.writer.worker_id}: no progress {where}"
                handoff.session.deadline = now + self._timeout_s
                self._cancel(handoff, RefuseReason.TIMEOUT, FailureKind.TIMEOUT, text)
        self._reserve_next(now)

    def abort(self, request_id: RequestId) -> None:
        handoff = self._handoffs.get(request_id)
        if handoff is not None and handoff.session.live:
            self._cancel(handoff, RefuseReason.ABORTED, None, "aborted")

    def update_membership(self, membership: Membership, now: float) -> None:
        self._membership = membership
        for handoff in [h for h in self._handoffs.values() if membership.has_ended(h.offer.writer) and not h.writer_died]:
            self._writer_died(handoff, now)

    def _writer_died(self, handoff: Incoming, now: float) -> None:
        if handoff.session.state in (HandoffState.RESERVED, HandoffState.MOVING):
            self._count(handoff, now)                        # all may have arrived before it died
        if handoff.session.ended:
            return
        if handoff.session.live:
            writer = handoff.offer.writer
            self._on_failure(handoff.request, FailureKind.PEER_LOST, f"{writer.worker_id} epoch {writer.epoch} has died")
            handoff.session.move(HandoffState.CANCELLING)
        handoff.landed, handoff.writer_died = None, True
        self._fence(handoff, now)

    def _fence(self, handoff: Incoming, now: float) -> None:
        if handoff.imm is None or self._transport.fence(handoff.offer.descriptors, FENCE_S):
            self._end(handoff, HandoffState.FAILED)
        else:
            handoff.session.deadline = now + FENCE_PAUSE_S

    # doing

    def _reserve_next(self, now: float, wanted: Incoming | None = None) -> bool:
        """Reserves for those that wait, most urgent first, until one does not fit; True if `wanted` got its blocks."""
        offered = [h for h in self._handoffs.values() if h.session.state is HandoffState.OFFERED]
        for handoff in sorted(offered, key=lambda h: h.due_at):
            if not self._reserve(handoff, now):
                return False
            if handoff is wanted:
                return True
        return False

    def _reserve(self, handoff: Incoming, now: float) -> bool:
        scheduler, pool = self._engine.scheduler, self._engine.pool
        due_at = handoff.due_at
        if scheduler.owes_memory(due_at):
            return False                                     # preempted: what becomes free is theirs first
        num_live = scheduler.num_reserved + len(scheduler.running)
        prefix = pool.match(handoff.hashes)
        num_new = scheduler.blocks_for(len(handoff.request.token_ids)) - len(prefix)
        if not self.imms:
            return False
        if not has_room(pool, num_new, num_live, self._engine.limits.max_sequences):
            scheduler.claim(num_new + num_live, due_at)
            return False
        blocks = pool.take(num_new, prefix)
        if blocks is None:
            return False
        handoff.blocks, handoff.num_cached, handoff.imm = blocks, len(prefix), self.imms.pop()
        scheduler.num_reserved += 1
        self._transport.reset(handoff.imm)
        handoff.session.move(HandoffState.RESERVED)
        handoff.session.deadline = now + self._timeout_s
        accept = KVAccept(handoff.ticket, handoff.num_cached, tuple(blocks[len(prefix) :]), handoff.imm)
        self._post.send(handoff.offer.writer.address, accept)
        return True

    def _count(self, handoff: Incoming, now: float) -> None:
        assert handoff.imm is not None
        counted = self._transport.num_landed(handoff.imm)
        if counted != handoff.num_seen:                      # progress renews the lease
            handoff.num_seen, handoff.seen_at = counted, now
            handoff.session.deadline = now + self._timeout_s
        if handoff.session.state is HandoffState.RESERVED and (counted or handoff.landed):
            handoff.session.move(HandoffState.MOVING)
        if handoff.landed is None:
            return
        announced = handoff.landed.num_pages * self._pieces_per_page
        if counted == announced:
            self._commit(handoff, handoff.landed.first, now)
        elif counted > announced:
            text = f"{self._as_pages(counted)} counted, {handoff.landed.num_pages} announced"
            self._cancel(handoff, RefuseReason.PAGE_COUNT, FailureKind.INTERNAL, text)

    def _as_pages(self, counted: int) -> str:
        pages, pieces = divmod(counted, self._pieces_per_page)
        return f"{pages} pages" + (f" and {pieces} of {self._pieces_per_page} pieces" if pieces else "")

    def _commit(self, handoff: Incoming, first: TokenDelta, now: float) -> None:
        blocks, handoff.blocks = handoff.blocks, []          # the sequence holds them from here on
        self._end(handoff, HandoffState.LANDED)
        self._engine.adopt(handoff.request, first, blocks, now, handoff.hashes, handoff.token_ids)
        self._post.send(handoff.offer.writer.address, KVCommitted(handoff.ticket))

    def _cancel(self, handoff: Incoming, reason: RefuseReason, kind: FailureKind | None, text: str) -> None:
        if kind is not None:
            self._on_failure(handoff.request, kind, text)
        handoff.session.move(HandoffState.CANCELLING)
        handoff.landed = None
        handoff.cancel = KVCancel(handoff.ticket, reason)
        self._post.send(handoff.offer.writer.address, handoff.cancel)

    def _end(self, handoff: Incoming, state: HandoffState) -> None:
        handoff.session.move(state)
        self._engine.pool.release(handoff.blocks)
        if handoff.imm is not None:
            self.imms.append(handoff.imm)
            self._engine.scheduler.num_reserved -= 1
        del self._handoffs[handoff.ticket.request_id]
        self._consumed[handoff.ticket] = None
        if len(self._consumed) > MAX_REMEMBERED_TICKETS:
            self._consumed.popitem(last=False)

    def _refuse(self, writer: WorkerRef, ticket: Ticket, reason: RefuseReason, text: str) -> None:
        self._post.send(writer.address, KVRefuse(ticket, reason, text))
