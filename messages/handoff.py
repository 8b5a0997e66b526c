"""The KV handoff between a prefill worker (the writer) and a decode worker (the receiver).

    writer                                      receiver
      │ ── KVOffer ───────────────────────────►  │  ticket, layout and prefix cache checked
      │ ◄─────────────── KVAccept / KVWait / KVRefuse
      │ ══ pages, one-sided ═══════════════════► │  the receiver's CPU does nothing
      │ ── KVLanded ──────────────────────────►  │  expected == counted? then commit
      │ ◄──────────────────────────── KVCommitted│  the writer frees its own blocks
      │                                          │
      │ ◄─ KVCancel ── at any point, either way ─► KVCancel
      │ ── KVDrained ─────────────────────────►  │  the writer has stopped: only now may reserved blocks be reused

A probe borrows blocks that no sequence uses, so that a link can be measured before it is needed:

    writer ── KVProbe ──► KVProbeAccept ──► pages ══► KVProbeSent ──► KVProbeCounted, several rounds ──► KVDrained: the blocks go back

Every message carries the ticket. One that is stale, unknown, consumed or forged changes nothing: a question (KVOffer, KVProbe) or an
announcement (KVLanded) is answered with KVRefuse, anything else is passed over.
"""

from enum import StrEnum

from msgspec import Struct

from .ids import BlockId, Epoch, Imm, RequestId, WorkerId
from .membership import MemoryDescriptor, PoolLayout
from .requests import GenerateRequest, TokenDelta, WorkerRef


class Ticket(Struct, frozen=True, array_like=True):
    """Names one handoff. Two are equal only if they are the same one; `decode_epoch` fences a restarted receiver."""

    decode_id: WorkerId
    decode_epoch: Epoch
    request_id: RequestId
    nonce: int


class RefuseReason(StrEnum):
    STALE_EPOCH = "stale_epoch"
    UNKNOWN_TICKET = "unknown_ticket"
    CONSUMED_TICKET = "consumed_ticket"
    LAYOUT = "layout"
    TOO_LARGE = "too_large"                   # longer than this worker's contexts
    DRAINING = "draining"
    TIMEOUT = "timeout"
    ABORTED = "aborted"
    BUSY = "busy"                             # a probe may ask again later
    PAGE_COUNT = "page_count"                 # announced is not what was reserved, or less than was counted
    MALFORMED = "malformed"                   # block ids, counts or tokens that cannot be


class KVOffer(Struct, frozen=True, tag=True):
    ticket: Ticket
    writer: WorkerRef
    layout: PoolLayout                        # of the pages that will be written
    request: GenerateRequest                  # all that the receiver needs to find its blocks and to continue the sequence
    descriptors: tuple[MemoryDescriptor, ...] = ()    # the writer's: what to fence if it dies, even before its listing has come


class KVAccept(Struct, frozen=True, tag=True):
    ticket: Ticket
    num_cached_blocks: int                    # leading blocks that need not be sent
    block_ids: tuple[BlockId, ...]            # the receiver's blocks for the rest, in order
    imm: Imm


class KVWait(Struct, frozen=True, tag=True):
    """No memory now; KVAccept or KVRefuse follows. The writer keeps the KV meanwhile."""

    ticket: Ticket


class KVRefuse(Struct, frozen=True, tag=True):
    ticket: Ticket
    reason: RefuseReason
    message: str


class KVLanded(Struct, frozen=True, tag=True):
    """All pages are on their way or just about to be, `num_pages` of them; with what the receiver needs to continue."""

    ticket: Ticket
    writer: WorkerRef
    num_pages: int
    first: TokenDelta                         # token 0 of this attempt, as sent to the gateway


class KVCommitted(Struct, frozen=True, tag=True):
    ticket: Ticket


class KVCancel(Struct, frozen=True, tag=True):
    ticket: Ticket
    reason: RefuseReason


class KVDrained(Struct, frozen=True, tag=True):
    """The writer will not touch this ticket's blocks again."""

    ticket: Ticket


class KVProbe(Struct, frozen=True, tag=True):
    """Asks for blocks to write into. The ticket's request id names no request."""

    ticket: Ticket
    writer: WorkerRef
    layout: PoolLayout
    num_blocks: int                           # wanted; fewer will do
    descriptors: tuple[MemoryDescriptor, ...] = ()    # the writer's: what to fence if it dies


class KVProbeAccept(Struct, frozen=True, tag=True):
    ticket: Ticket
    block_ids: tuple[BlockId, ...]            # at least one; the writer's until KVDrained
    imm: Imm


class KVProbeSent(Struct, frozen=True, tag=True):
    ticket: Ticket
    num_pages: int                            # on their way or there, since the probe began


class KVProbeCounted(Struct, frozen=True, tag=True):
    """All of them are there."""

    ticket: Ticket
    num_pages: int
