"""What a writer knows of one handoff: values, and no more than questions about them."""

from dataclasses import dataclass, field

from ..engine.sequence import Sequence
from ..kvtransfer.plan import PagePlan
from ..kvtransfer.session import Session
from ..kvtransfer.staging import StagedPages
from ..kvtransfer.transport import NUM_IMMS, Peer
from ..messages.handoff import KVAccept, Ticket
from ..messages.ids import BlockId
from ..messages.requests import FailureKind, TokenDelta, WorkerRef


@dataclass(frozen=True)
class Failure:
    kind: FailureKind
    message: str
    retryable: bool = True


@dataclass(eq=False)
class Outgoing:
    session: Session
    sequence: Sequence
    decode: WorkerRef
    offered_at: float
    accept: KVAccept | None = None          # kept until the peer is connected
    accepted_at: float = 0.0
    silent_until: float = 0.0               # from then on nothing that is ready waits for more
    has_written: bool = False               # since `silent_until` was set
    plan: PagePlan | StagedPages | None = None
    peer: Peer | None = None
    busy_before_s: float = 0.0              # the counter's, of an earlier use whose books the transport had not closed
    num_ready: int = 0                      # leading blocks that are complete in all layers
    num_pushed: int = 0                     # of these, as of the last push
    first: TokenDelta | None = None
    announced: bool = False                 # KVLanded is out
    broken: str | None = None               # a write failed in the middle of a step; dealt with after it
    kept: list[BlockId] = field(default_factory=list)          # held beyond the sequence's end: a write may still read them

    @property
    def ticket(self) -> Ticket:
        return self.session.ticket

    @property
    def is_short(self) -> bool:
        """What is due waits for pages to be made in."""
        return isinstance(self.plan, StagedPages) and self.plan.is_short


def what_is_wrong(accept: KVAccept, num_blocks: int) -> str | None:
    """`num_blocks`: that hold the prompt at the receiver."""
    if accept.num_cached_blocks + len(accept.block_ids) != num_blocks or accept.num_cached_blocks < 0:
        return f"{accept.num_cached_blocks} cached + {len(accept.block_ids)} blocks for {num_blocks}"
    if len(set(accept.block_ids)) != len(accept.block_ids) or min(accept.block_ids, default=0) < 0:
        return "repeated or negative block ids"
    if not 0 <= accept.imm < NUM_IMMS:
        return f"counter {accept.imm} of {NUM_IMMS}"
    return None
