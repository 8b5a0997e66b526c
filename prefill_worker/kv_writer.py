"""The writer's side of all handoffs of one prefill worker.

    offer ──► KVAccept ──► pages leave while later layers and chunks compute ──► first token ──► KVLanded ──► KVCommitted: blocks freed
                │ (late: what is ready leaves at once)
    any refusal, cancel, deadline or death: stop writing, say KVDrained, free the blocks, tell the gateway

A decode worker whose layout differs gets pages that were converted here first (`kvtransfer/staging.py`): all that this file counts in
is then the receiver's blocks.

Blocks that a write may still read are kept until it has stopped, also of a handoff that was given up: once announced, its pages may be
counted and served all the same.
"""

import logging
from collections.abc import Callable

from ..engine.block_pool import BlockPool
from ..engine.scheduler import Chunk, StepPlan
from ..engine.sequence import Sequence
from ..engine.worker import ATTENTION_S
from ..kvtransfer.plan import PagePlan, leave_after, may_wait
from ..kvtransfer.session import HandoffState, Session
from ..kvtransfer.staging import StagedPages, Staging
from ..kvtransfer.transport import Bundle, KVMemory, Peer
from ..messages.errors import PeerGone, TransferError
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
from ..messages.ids import BlockId, RequestId, new_nonce
from ..messages.membership import Member, Membership, Role
from ..messages.post import Post
from ..messages.requests import FailureKind, RequestSpan, TokenDelta, TransferFailed, WorkerRef
from .outgoing import Failure, Outgoing, what_is_wrong

LINK_WAIT_S = 2.0
"""A handoff that was accepted waits so long for a link that is down; then another route may do better."""

SILENT_SHARE = 0.25
"""Of the time after which a receiver that has counted nothing gives up: so long pages may wait for others."""

logger = logging.getLogger(__name__)

WriterMessage = KVAccept | KVWait | KVRefuse | KVCommitted | KVCancel


class KVWriter:
    """`on_end(sequence, failure)` is called once per handoff; failure None means committed, or ended on purpose."""

    def __init__(
        self,
        me: WorkerRef,
        post: Post,
        transport: Bundle,
        pool: KVMemory,
        blocks: BlockPool,
        timeout_s: float,
        layer_group: int,
        on_end: Callable[[Sequence, Failure | None], None],
        staging: Staging | None = None,
    ) -> None:
        """`transport` and `pool`: what pages are written from; with `staging`, they are its own. `blocks`: who holds the engine's."""
        self._me = me
        self._post = post
        self._transport = transport
        self._layout = pool.layout
        self._blocks = blocks
        self._timeout_s = timeout_s
        self._layer_group = layer_group
        self._on_end = on_end
        self._staging = staging
        self._handoffs: dict[RequestId, Outgoing] = {}
        self._members: dict[WorkerRef, Member] = {}

    def __len__(self) -> int:
        return len(self._handoffs)

    def __contains__(self, request_id: RequestId) -> bool:
        """Also one that was given up and is still to be drained."""
        return request_id in self._handoffs

    @property
    def is_waiting(self) -> bool:
        """Something of the transport's is to be polled for."""
        return any(
            handoff.session.state is HandoffState.CANCELLING or (handoff.accept and handoff.plan is None) or handoff.is_short
            for handoff in self._handoffs.values()
        )

    def expects_answer(self, now: float) -> bool:
        """An offer has just left."""
        return any(h.session.state is HandoffState.OFFERED and now < h.offered_at + ATTENTION_S for h in self._handoffs.values())

    # what the worker's loop tells

    def offer(self, sequence: Sequence, now: float) -> None:
        decode = sequence.request.route.decode
        ticket = Ticket(decode.worker_id, decode.epoch, sequence.id, new_nonce())
        self._handoffs[sequence.id] = Outgoing(Session(ticket, now + self._timeout_s), sequence, decode, now)
        offer = KVOffer(
            ticket=ticket,
            writer=self._me,
            layout=self._layout.told,
            request=sequence.request,
            descriptors=self._transport.descriptors,
        )
        self._post.send(decode.address, offer)

    def layer_finished(self, plan: StepPlan, layer: int) -> None:
        """Layer `layer` of the step under way is in the pool: at the end of some groups of layers pages leave."""
        for chunk in plan.chunks:
            handoff = self._handoffs.get(chunk.sequence.id)
            if handoff is not None and leave_after(layer, self._layout.num_layers, self._layer_group, self._gathers(handoff)):
                num_ready = self._num_ready_after(chunk)
                if not self._may_wait(handoff, num_ready):
                    # What earlier steps computed is complete in all layers: the fewer pages are left for after this one's last.
                    self._write(handoff, range(self._layout.num_layers), chunk.start // self._layout.block_size)
                    self._write(handoff, range(layer + 1), num_ready)

    def chunk_finished(self, chunk: Chunk, delta: TokenDelta | None, now: float) -> None:
        handoff = self._handoffs.get(chunk.sequence.id)
        if handoff is None:
            return
        handoff.num_ready = self._num_ready_after(chunk)
        handoff.first = delta
        if delta is not None and delta.finish is not None:
            self._give_up(handoff, None, now)              # the first token was the last: nobody needs the KV
        else:
            self._push(handoff, now)

    def tick(self, now: float) -> None:
        for handoff in list(self._handoffs.values()):
            if handoff.session.state is HandoffState.CANCELLING:
                self._try_drain(handoff)
            elif now >= handoff.session.deadline:
                failure = Failure(FailureKind.TIMEOUT, f"{handoff.decode.worker_id} did not answer in {handoff.session.state.name}")
                self._give_up(handoff, failure, now)
            elif handoff.accept is not None and handoff.plan is None:
                self._connect(handoff, now)
            elif handoff.is_short or (now >= handoff.silent_until and handoff.num_pushed < handoff.num_ready):
                self._push(handoff, now)

    def abort(self, request_id: RequestId, now: float) -> None:
        handoff = self._handoffs.get(request_id)
        if handoff is not None and handoff.session.live:
            self._give_up(handoff, None, now)

    def update_membership(self, membership: Membership, gone: list[WorkerRef]) -> None:
        old, self._members = self._members, {member.ref: member for member in membership.workers}
        for handoff in [h for h in self._handoffs.values() if h.decode in gone]:
            live = handoff.session.live
            failure = Failure(FailureKind.PEER_LOST, f"{handoff.decode.worker_id} epoch {handoff.decode.epoch} has died")
            self._end(handoff, HandoffState.FAILED, failure if live else None)
        for ref in set(old) - set(self._members):
            self._transport.disconnect(old[ref].descriptors)
        for ref in set(self._members) - set(old):
            self._dial(self._members[ref])

    def _dial(self, member: Member) -> None:
        """Now, so that no handoff has to wait for it."""
        if member.role is Role.DECODE:
            try:
                self._transport.connect(member.descriptors)
            except TransferError as error:
                logger.warning("%s cannot be reached: %s", member.ref.worker_id, error)

    # what the receiver tells

    def receive(self, message: WriterMessage, now: float) -> None:
        handoff = self._handoffs.get(message.ticket.request_id)
        if handoff is None or handoff.ticket != message.ticket:
            self._answer_stranger(message)
            return
        match message:
            case KVAccept() if handoff.session.state is HandoffState.OFFERED and handoff.accept is None:
                self._accepted(handoff, message, now)
            case KVWait() if handoff.session.state is HandoffState.OFFERED:
                handoff.session.deadline = handoff.sequence.deadline
            case KVRefuse() if message.reason is not RefuseReason.CONSUMED_TICKET and handoff.session.live:
                self._refused(handoff, message, now)
            case KVCommitted() if handoff.session.state is HandoffState.MOVING and handoff.announced:
                self._committed(handoff, now)
            case KVCancel() if handoff.session.live:
                aborted = message.reason is RefuseReason.ABORTED
                text = f"{handoff.decode.worker_id} gave the handoff up: {message.reason}"
                self._give_up(handoff, None if aborted else Failure(FailureKind.PEER_LOST, text), now)
            case _:
                pass                                      # doubled or late: nothing changes

    def _answer_stranger(self, message: WriterMessage) -> None:
        """For a ticket that is not (or no longer) ours nothing will ever be written: the receiver may let go."""
        if isinstance(message, KVAccept | KVWait | KVCancel):
            for ref in self._members:
                if (ref.worker_id, ref.epoch) == (message.ticket.decode_id, message.ticket.decode_epoch):
                    self._post.send(ref.address, KVDrained(message.ticket))

    def _accepted(self, handoff: Outgoing, accept: KVAccept, now: float) -> None:
        wrong = what_is_wrong(accept, self._num_blocks(handoff.sequence))
        if wrong:
            self._give_up(handoff, Failure(FailureKind.INTERNAL, f"{handoff.decode.worker_id} accepted with {wrong}"), now)
            return
        handoff.accept, handoff.accepted_at = accept, now
        handoff.session.move(HandoffState.RESERVED)
        handoff.session.deadline = min(handoff.sequence.deadline, now + self._timeout_s)
        self._connect(handoff, now)

    def _refused(self, handoff: Outgoing, refusal: KVRefuse, now: float) -> None:
        text = f"{handoff.decode.worker_id} refused: {refusal.reason}: {refusal.message}"
        retryable = refusal.reason not in (RefuseReason.TOO_LARGE, RefuseReason.LAYOUT)
        kind = FailureKind.REFUSED if retryable else FailureKind.INVALID
        self._give_up(handoff, Failure(kind, text, retryable), now)

    def _committed(self, handoff: Outgoing, now: float) -> None:
        """The receiver has counted every page, so nothing can still land, though the transport may not have noticed yet: `stop` only closes
        its books here. Asking until it has would be wrong: the receiver may have lent the counter anew, and its pages would be dropped."""
        assert handoff.plan is not None
        assert handoff.peer is not None
        assert handoff.accept is not None
        request = handoff.sequence.request
        span = RequestSpan(
            request_id=request.request_id,
            worker=self._me,
            decode_id=handoff.decode.worker_id,
            transport=handoff.peer.descriptor.transport,
            num_pages=handoff.plan.num_pages,
            num_bytes=handoff.plan.num_pages * self._layout.page_bytes,
            num_skipped_blocks=handoff.plan.num_skipped,
            transfer_s=max(0.0, self._transport.busy_s(handoff.peer, handoff.accept.imm) - handoff.busy_before_s),
            handoff_s=now - handoff.offered_at,
        )
        self._transport.stop(handoff.peer, handoff.accept.imm, 0.0)
        self._post.send(request.gateway, span)
        self._end(handoff, HandoffState.LANDED, None)

    # doing

    def _connect(self, handoff: Outgoing, now: float) -> None:
        """The receiver's memory is known from the membership, which may still be on its way here."""
        member = self._members.get(handoff.decode)
        if member is None:
            return
        assert handoff.accept is not None
        if (highest := max(handoff.accept.block_ids, default=0)) >= member.num_blocks:
            text = f"{member.ref.worker_id} accepted with block {highest} of {member.num_blocks}"
            self._give_up(handoff, Failure(FailureKind.INTERNAL, text), now)
            return
        try:
            peer = self._transport.connect(member.descriptors)
            if peer is None and now >= handoff.accepted_at + LINK_WAIT_S:
                raise PeerGone(f"no link for {LINK_WAIT_S} s")
        except TransferError as error:
            self._give_up(handoff, Failure(FailureKind.PEER_LOST, f"cannot reach {member.ref.worker_id}: {error!r}"), now)
            return
        if peer is None:
            return                                         # tick asks again
        if handoff.accept.imm >= peer.descriptor.num_imms:
            text = f"{member.ref.worker_id} accepted with counter {handoff.accept.imm} of {peer.descriptor.num_imms}"
            self._give_up(handoff, Failure(FailureKind.INTERNAL, text), now)
            return
        handoff.peer, handoff.busy_before_s = peer, self._transport.busy_s(peer, handoff.accept.imm)
        handoff.session.deadline = handoff.sequence.deadline
        handoff.plan = self._plan(handoff.sequence, handoff.accept, peer)
        handoff.silent_until = self._silent_until(now)
        self._push(handoff, now)

    def _plan(self, sequence: Sequence, accept: KVAccept, peer: Peer) -> PagePlan | StagedPages:
        where = (accept.block_ids, accept.num_cached_blocks)
        if self._staging is None:
            return PagePlan(self._layout.num_layers, list(sequence.blocks), *where)
        by_index = [BlockId(i) for i in range(self._num_blocks(sequence))]
        return self._staging.open(PagePlan(self._layout.num_layers, by_index, *where), sequence.blocks, peer, accept.imm)

    def _push(self, handoff: Outgoing, now: float) -> None:
        """All that is ready leaves. With the first token there that is all, and announced before it leaves: the message travels while
        the host starts the writes, and whether they have arrived is counted."""
        if handoff.plan is None or not handoff.session.live:
            return
        is_all_launched = handoff.sequence.num_computed >= len(handoff.sequence.request.token_ids)      # no step will take them along
        if now < handoff.silent_until and not is_all_launched and self._may_wait(handoff, handoff.num_ready):
            return
        if handoff.first is not None and handoff.broken is None and not handoff.announced:
            self._announce(handoff, handoff.first, handoff.plan.num_pages, now)
        if self._write(handoff, range(self._layout.num_layers), handoff.num_ready) and handoff.announced:
            handoff.session.deadline = now + self._timeout_s
        handoff.num_pushed = handoff.num_ready
        if handoff.has_written:
            handoff.has_written, handoff.silent_until = False, self._silent_until(now)
        if handoff.broken is not None:
            self._give_up(handoff, Failure(FailureKind.PEER_LOST, handoff.broken), now)

    def _announce(self, handoff: Outgoing, first: TokenDelta, num_pages: int, now: float) -> None:
        if handoff.session.state is HandoffState.RESERVED:
            handoff.session.move(HandoffState.MOVING)      # accepted late, or the receiver had every block
        handoff.announced = True
        handoff.session.deadline = now + self._timeout_s
        self._post.send(handoff.decode.address, KVLanded(handoff.ticket, self._me, num_pages, first))

    def _silent_until(self, now: float) -> float:
        return now + SILENT_SHARE * self._timeout_s

    def _may_wait(self, handoff: Outgoing, num_ready: int) -> bool:
        return self._gathers(handoff) and may_wait(num_ready, self._num_blocks(handoff.sequence))

    def _gathers(self, handoff: Outgoing) -> bool:
        """What is converted first needs pages of a small pool, which have to come back."""
        return handoff.peer is not None and self._staging is None and self._transport.gathers(handoff.peer)

    def _write(self, handoff: Outgoing, layers: range, num_ready: int) -> bool:
        """Starts what is due, if anything is; a failure is only noted, since the engine may be in the middle of a step."""
        if handoff.plan is None or handoff.peer is None or handoff.accept is None or not handoff.session.live:
            return False
        writes = handoff.plan.take(layers, num_ready)
        if not len(writes) or handoff.broken is not None:
            return False
        if handoff.session.state is HandoffState.RESERVED:
            handoff.session.move(HandoffState.MOVING)
        handoff.has_written = True
        try:
            self._transport.write_pages(handoff.peer, writes.src, writes.dst, handoff.accept.imm)
        except TransferError as error:
            handoff.broken = str(error)
        return True

    def _give_up(self, handoff: Outgoing, failure: Failure | None, now: float) -> None:
        handoff.session.move(HandoffState.CANCELLING)
        self._report(handoff, failure)
        if not self._has_stopped(handoff):
            kept = self._blocks.take(0, handoff.sequence.blocks)
            assert kept is not None, "what is held can be held once more"
            handoff.kept = kept
        self._on_end(handoff.sequence, failure)
        self._try_drain(handoff)

    def _report(self, handoff: Outgoing, failure: Failure | None) -> None:
        """A refusal is none of the transfer's."""
        if failure is not None and failure.kind not in (FailureKind.REFUSED, FailureKind.INVALID):
            transport = handoff.peer.descriptor.transport if handoff.peer is not None else "none"
            failed = TransferFailed(self._me, handoff.decode.worker_id, transport, failure.message)
            self._post.send(handoff.sequence.request.gateway, failed)

    def _try_drain(self, handoff: Outgoing) -> None:
        if not self._has_stopped(handoff):
            return
        self._post.send(handoff.decode.address, KVDrained(handoff.ticket))
        handoff.session.move(HandoffState.CANCELLED)
        self._forget(handoff)

    def _has_stopped(self, handoff: Outgoing) -> bool:
        """And writes no more: what had not been started is dropped."""
        return handoff.peer is None or handoff.accept is None or self._transport.stop(handoff.peer, handoff.accept.imm, 0.0)

    def _end(self, handoff: Outgoing, state: HandoffState, failure: Failure | None) -> None:
        told = handoff.session.state is HandoffState.CANCELLING
        handoff.session.move(state)
        self._forget(handoff)
        if not told:
            self._report(handoff, failure)
            self._on_end(handoff.sequence, failure)

    def _forget(self, handoff: Outgoing) -> None:
        del self._handoffs[handoff.sequence.id]
        self._blocks.release(handoff.kept)
        if isinstance(handoff.plan, StagedPages):
            handoff.plan.close()

    def _num_ready_after(self, chunk: Chunk) -> int:
        if chunk.end == len(chunk.sequence.request.token_ids):
            return self._num_blocks(chunk.sequence)
        return chunk.end // self._layout.block_size

    def _num_blocks(self, sequence: Sequence) -> int:
        """That hold the prompt there."""
        return -(-len(sequence.request.token_ids) // self._layout.block_size)
