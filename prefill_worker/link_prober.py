"""Measures the link to every decode worker that this prefill worker meets, before requests depend on it.

    met ──► KVProbe ──► KVProbeAccept ──► per transport, round: write ─► KVProbeSent ─► KVProbeCounted ─► LinkMeasured ─► KVDrained
     ▲         │ BUSY, no link, no answer: later; any other refusal would be said again: not before the membership changes
     └─────────┴── found anew, or over another transport; below the floor, not over every transport, not alone: after a while

Every transport that both ends have is measured, and the fastest is used from then on (`kvtransfer/selection.py`). One link at a time, and
none is begun while KV is being handed over, so that the figures are of the link alone and no request waits for them; but under steady load
that moment may never come, and after a while (`probe_times.py`) one is taken beside handoffs. It can only be too low: no link is refused
for it. Until a link is measured it is used, in the spec's order of transports. A page of the first round pays for what is slow once; each
figure is the best of two rounds. What is written is whatever the first pages of this worker's pool hold, into blocks that no sequence uses.
"""

import logging
import math
from contextlib import suppress

from ..kvtransfer.selection import fastest_first
from ..kvtransfer.session import HandoffState, Session
from ..kvtransfer.transport import NUM_IMMS, Bundle, KVMemory, Peer
from ..messages.errors import LinkTooSlow, PeerGone, TransferError
from ..messages.handoff import KVCancel, KVDrained, KVProbe, KVProbeAccept, KVProbeCounted, KVProbeSent, KVRefuse, RefuseReason, Ticket
from ..messages.ids import Address, RequestId, new_nonce
from ..messages.membership import Member, Membership, Role
from ..messages.post import Post
from ..messages.requests import LinkFigures, LinkMeasured, WorkerRef
from .probe import Floor, Probe, describe
from .probe_times import RETRY_S, ProbeTimes

PROBE_BYTES = 16 << 20
"""Of a round that measures GB/s: as much as the pools' page size and free blocks allow."""

LINK_WAIT_S = 2.0             # for the transport's connection

logger = logging.getLogger(__name__)

ProbeAnswer = KVProbeAccept | KVProbeCounted | KVRefuse | KVCancel


class LinkProber:
    def __init__(self, me: WorkerRef, post: Post, transport: Bundle, pool: KVMemory, timeout_s: float, floor: Floor) -> None:
        self._me = me
        self._post = post
        self._transport = transport
        self._layout = pool.layout
        self._num_own_pages = pool.num_blocks * pool.layout.num_layers
        self._timeout_s = timeout_s
        self._floor = floor
        self._probe: Probe | None = None
        self._times = ProbeTimes()
        self._look_at = -math.inf                            # for links that are new, while there is no quiet moment
        self._targets: dict[WorkerRef, Member] = {}
        self._links: dict[WorkerRef, LinkMeasured] = {}
        self._measured_as: dict[WorkerRef, int] = {}         # which of the pair's links that was, as the transports count them
        self._gateways: tuple[Address, ...] = ()

    @property
    def links(self) -> tuple[LinkMeasured, ...]:
        return tuple(self._links.values())

    @property
    def is_probing(self) -> bool:
        return self._probe is not None

    @property
    def is_waiting(self) -> bool:
        """Something of the transport's is to be polled for."""
        probe = self._probe
        if probe is None or probe.session.state is HandoffState.OFFERED:
            return False
        return probe.session.state is HandoffState.CANCELLING or probe.peer is None or probe.num_counted == probe.num_sent

    def check(self, decode: WorkerRef) -> None:
        """Raises LinkTooSlow if the link there is known to be below the floor, and is not to be used for that."""
        link = self._links.get(decode)
        if link is not None and link.refused:
            raise LinkTooSlow(describe(link))

    def tick(self, now: float, is_quiet: bool) -> None:
        """`is_quiet`: no request is here, and no KV on its way."""
        probe = self._probe
        if probe is None:
            if is_quiet or now >= self._look_at:
                self._look_for_new_links(now)
            self._begin(now, is_quiet)
            return
        probe.is_alone = probe.is_alone and is_quiet
        if probe.session.state is HandoffState.CANCELLING:
            self._try_drain(probe)
        elif now >= probe.session.deadline:
            self._put_off(probe, f"no answer in {probe.session.state.name}", now)
        elif probe.accept is not None and probe.peer is None:
            self._connect(probe, probe.accept, now)
        elif probe.accept is not None and probe.peer is not None:
            self._look(probe, now)

    def receive(self, message: ProbeAnswer, now: float) -> bool:
        """False: about another ticket than the probe's."""
        probe = self._probe
        if probe is None or probe.ticket != message.ticket:
            if isinstance(message, KVProbeAccept):
                self._answer_stranger(message)
            return False
        match message:
            case KVProbeAccept() if probe.session.state is HandoffState.OFFERED:
                self._accepted(probe, message, now)
            case KVProbeCounted() if probe.session.live:
                probe.num_counted = max(probe.num_counted, message.num_pages)
                self._look(probe, now)
            case KVRefuse() if probe.session.state is HandoffState.OFFERED:
                self._refused(probe, message)
            case KVCancel() if probe.session.live:
                self._put_off(probe, f"given up there: {message.reason}", now)
            case _:
                pass                                         # doubled or late
        return True

    def update_membership(self, membership: Membership, now: float) -> None:
        """Peers that are no longer listed are dead, and disconnected already."""
        self._targets = {member.ref: member for member in membership.workers if member.role is Role.DECODE}
        if self._probe is not None and self._probe.target.ref not in self._targets:
            self._probe = None
        self._links = {ref: link for ref, link in self._links.items() if ref in self._targets}
        self._measured_as = {ref: count for ref, count in self._measured_as.items() if ref in self._targets}
        self._times.keep(self._targets)
        for ref in self._targets.keys() - self._links.keys():
            self._times.met(ref, now)
        for gateway in set(membership.gateways) - set(self._gateways):
            for link in self._links.values():
                self._post.send(gateway, link)
        self._gateways = membership.gateways

    # doing

    def _look_for_new_links(self, now: float) -> None:
        self._look_at = now + RETRY_S
        for ref, count in self._measured_as.items():
            if self._num_links(self._targets[ref]) != count:
                self._times.met(ref, now)

    def _num_links(self, target: Member) -> int:
        """So far, as of now: one that is down is noticed, and dialled, before a request needs it."""
        with suppress(TransferError):
            self._transport.connect(target.descriptors)
        return self._transport.num_links(target.descriptors)

    def _begin(self, now: float, is_quiet: bool) -> None:
        ref = self._times.begin(now, is_quiet, among=[ref for ref, target in self._targets.items() if not target.draining])
        if ref is None:
            return
        name = RequestId(f"probe of {self._me.worker_id}")
        ticket = Ticket(ref.worker_id, ref.epoch, name, new_nonce())
        self._probe = Probe(Session(ticket, now + self._timeout_s), self._targets[ref], is_quiet)
        num_blocks = max(1, PROBE_BYTES // self._layout.block_bytes)
        self._post.send(ref.address, KVProbe(ticket, self._me, self._layout.told, num_blocks, self._transport.descriptors))

    def _refused(self, probe: Probe, refusal: KVRefuse) -> None:
        """Nothing was lent."""
        self._probe = None
        if refusal.reason is not RefuseReason.BUSY:
            self._times.give_up(probe.target.ref)
            logger.warning("link to %s not measured: %s: %s", probe.target.ref.worker_id, refusal.reason, refusal.message)

    def _accepted(self, probe: Probe, accept: KVProbeAccept, now: float) -> None:
        num_layers = self._layout.num_layers
        dst = [block * num_layers + layer for block in accept.block_ids for layer in range(num_layers)]
        if not dst or min(dst) < 0 or max(dst) >= probe.target.num_blocks * num_layers:
            self._put_off(probe, f"accepted with blocks {accept.block_ids}", now)
            return
        if not 0 <= accept.imm < NUM_IMMS:
            self._put_off(probe, f"accepted with counter {accept.imm} of {NUM_IMMS}", now)
            return
        probe.pages = dst[: self._num_own_pages]
        probe.left = sorted(self._transport.common(probe.target.descriptors), key=self._transport.names.index)
        probe.accept = accept
        probe.session.move(HandoffState.RESERVED)
        self._next_transport(probe, accept, now)

    def _next_transport(self, probe: Probe, accept: KVProbeAccept, now: float) -> None:
        probe.link_deadline = now + min(LINK_WAIT_S, self._timeout_s / 2)
        probe.session.deadline = now + self._timeout_s
        if probe.left:
            self._connect(probe, accept, now)
        elif probe.measured:
            self._finish(probe, now)
        else:
            self._put_off(probe, "; ".join(probe.passed_over) or "no transport in common", now)

    def _connect(self, probe: Probe, accept: KVProbeAccept, now: float) -> None:
        try:
            probe.peer = self._transport.connect_over(probe.left[0], probe.target.descriptors)
            if probe.peer is None and now >= probe.link_deadline:
                raise PeerGone("no link in time")
        except TransferError as error:
            probe.pass_over(str(error))
            self._next_transport(probe, accept, now)
            return
        if probe.peer is not None and accept.imm >= probe.peer.descriptor.num_imms:
            self._put_off(probe, f"accepted with counter {accept.imm} of {probe.peer.descriptor.num_imms}", now)
        elif probe.peer is not None:
            probe.met(probe.peer, self._transport.busy_s(probe.peer, accept.imm))
            if probe.session.state is HandoffState.RESERVED:
                probe.session.move(HandoffState.MOVING)
            self._write_round(probe, probe.peer, accept, now)

    def _write_round(self, probe: Probe, peer: Peer, accept: KVProbeAccept, now: float) -> None:
        there = probe.pages[: probe.round_pages]
        try:
            self._transport.write_pages(peer, range(len(there)), there, accept.imm)
        except TransferError as error:
            self._put_off(probe, str(error), now)
            return
        probe.num_sent += len(there)
        probe.session.deadline = now + self._timeout_s
        self._post.send(probe.target.ref.address, KVProbeSent(probe.ticket, probe.num_sent))

    def _look(self, probe: Probe, now: float) -> None:
        """The round is over once the receiver has counted it and the transport has put its time down."""
        if probe.peer is None or probe.accept is None or probe.num_counted < probe.num_sent:
            return
        busy_s = self._transport.busy_s(probe.peer, probe.accept.imm)
        if busy_s <= probe.busy_s or not self._transport.settled(probe.peer, probe.accept.imm):
            return                                           # tick asks again: of several ranks, one may have put its time down
        probe.took(busy_s, self._layout.page_bytes)
        if probe.peer is not None:
            self._write_round(probe, probe.peer, probe.accept, now)
        else:
            self._next_transport(probe, probe.accept, now)

    def _finish(self, probe: Probe, now: float) -> None:
        best, *others = fastest_first(probe.measured)
        before = self._links.get(probe.target.ref)
        may_refuse = self._floor.refuse and (probe.is_alone or (before is not None and before.refused))
        link = LinkMeasured(
            worker=self._me,
            decode_id=probe.target.ref.worker_id,
            transport=best.transport,
            latency_s=best.latency_s,
            gbps=best.gbps,
            num_bytes=len(probe.pages) * self._layout.page_bytes,
            min_gbps=self._floor.min_gbps,
            refused=may_refuse and best.gbps < self._floor.min_gbps,
            others=tuple(others),
        )
        self._use(probe.target, [best, *others])
        self._learned(probe, link, now)
        self._give_back(probe)

    def _use(self, target: Member, order: list[LinkFigures]) -> None:
        """From the next handoff on."""
        self._transport.prefer(target.descriptors, [figures.transport for figures in order])
        self._measured_as[target.ref] = self._num_links(target)

    def _learned(self, probe: Probe, link: LinkMeasured, now: float) -> None:
        ref = probe.target.ref
        before = self._links.get(ref)
        self._links[ref] = link
        self._times.measured(ref, now, enough=not (link.below_floor or probe.passed_over), alone=probe.is_alone)
        if before is None or (before.below_floor, before.transport) != (link.below_floor, link.transport):
            beside = "" if probe.is_alone else " (measured beside handoffs)"
            logger.log(logging.WARNING if link.below_floor else logging.INFO, "%s%s", describe(link), beside)
        for gateway in self._gateways:
            self._post.send(gateway, link)

    def _put_off(self, probe: Probe, why: str, now: float) -> None:
        ref = probe.target.ref
        logger.warning("link to %s not measured: %s", ref.worker_id, why)
        self._times.failed(ref, now)
        self._give_back(probe)

    def _give_back(self, probe: Probe) -> None:
        probe.session.move(HandoffState.CANCELLING)
        self._try_drain(probe)

    def _try_drain(self, probe: Probe) -> None:
        if probe.accept is not None and not all(self._transport.stop(peer, probe.accept.imm, 0.0) for peer in probe.peers):
            return
        self._post.send(probe.target.ref.address, KVDrained(probe.ticket))
        self._probe = None

    def _answer_stranger(self, accept: KVProbeAccept) -> None:
        """Nothing will ever be written for it: the receiver may let go."""
        for ref in self._targets:
            if (ref.worker_id, ref.epoch) == (accept.ticket.decode_id, accept.ticket.decode_epoch):
                self._post.send(ref.address, KVDrained(accept.ticket))
