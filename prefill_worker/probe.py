"""One measurement of a link, transport by transport: what is still to be written, and what the writes took. Pure.

    of each transport:  a page, a page, all pages, all pages       latency and GB/s are the best of two
"""

from dataclasses import dataclass, field

from ..kvtransfer.session import Session
from ..kvtransfer.transport import Peer
from ..messages.handoff import KVProbeAccept, Ticket
from ..messages.membership import Member
from ..messages.requests import LinkFigures, LinkMeasured

NUM_SMALL, NUM_ROUNDS = 2, 4


@dataclass(frozen=True)
class Floor:
    min_gbps: float           # 0: none
    refuse: bool              # what is below it; False: warn


@dataclass(eq=False)
class Probe:
    session: Session
    target: Member
    is_alone: bool                                     # no handoff has been under way so far
    accept: KVProbeAccept | None = None
    pages: list[int] = field(default_factory=list)     # there, of a large round
    num_sent: int = 0                                  # pages, of all rounds
    num_counted: int = 0
    left: list[str] = field(default_factory=list)      # transports that are still to be measured, in the spec's order
    measured: list[LinkFigures] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)               # transports without a link, and why
    peers: list[Peer] = field(default_factory=list)    # that were written to
    # of the first that is left:
    link_deadline: float = 0.0
    peer: Peer | None = None                           # None: not connected yet
    times_s: list[float] = field(default_factory=list)     # of each round so far
    busy_s: float = 0.0                                # the transport's, as of the last round's end

    @property
    def ticket(self) -> Ticket:
        return self.session.ticket

    @property
    def round_pages(self) -> int:
        """Of the round under way."""
        return 1 if len(self.times_s) < NUM_SMALL else len(self.pages)

    def pass_over(self, why: str) -> None:
        self.passed_over.append(f"{self.left.pop(0)}: {why}")

    def met(self, peer: Peer, busy_s: float) -> None:
        """`busy_s`: what an earlier use of the counter has left."""
        self.peer, self.busy_s, self.times_s = peer, busy_s, []
        self.peers.append(peer)

    def took(self, busy_s: float, page_bytes: int) -> None:
        """A round is over; after the last one there is no peer any more."""
        self.times_s.append(busy_s - self.busy_s)
        self.busy_s = busy_s
        if len(self.times_s) == NUM_ROUNDS:
            gbps = len(self.pages) * page_bytes / min(self.times_s[NUM_SMALL:]) / 1e9
            self.measured.append(LinkFigures(self.left.pop(0), min(self.times_s[:NUM_SMALL]), gbps))
            self.peer = None


def describe(link: LinkMeasured) -> str:
    used = f"{link.transport}: {link.gbps:.2f} GB/s, {link.latency_s * 1e6:.0f} µs a page"
    others = "".join(f"; {other.transport}: {other.gbps:.2f} GB/s, {other.latency_s * 1e6:.0f} µs" for other in link.others)
    text = f"{link.worker.worker_id} → {link.decode_id} over {used}{others}"
    if not link.below_floor:
        return text
    return f"{text}; below the floor of {link.min_gbps:g} GB/s, {'not used' if link.refused else 'used all the same'}"
