"""What an engine computes next. Pure: sequences and a block pool in, one StepPlan out.

A step takes the running decodes (one token each), then continues prompts that are partly computed, then admits waiting ones by
urgency, all under a token budget (SARATHI, OSDI'24, section 4) and, with a Pacer, within the time that decodes have to spare. Admission
takes the blocks of the whole prompt at once, so that a prompt under way is never stuck halfway.

Preempted, to compute again later, is who has most slack: the least urgent, when a decode finds no block; batch work, when somebody more
urgent finds no room. What is handed off is never preempted, for somebody may be writing or reading its pages. Batch work gives steps away,
too: its decodes take what time the pace of others leaves, and all but one wait while somebody else's prompt is computed.
"""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass

from msgspec import Struct

from ..messages.ids import BlockId
from .block_pool import BlockPool
from .pace import Pacer, StepRoom
from .sequence import Sequence, SequenceState

MAX_SCORED_TOKENS = 1024
"""In one step, of prompts whose log-probabilities are asked for: each has a row of logits as wide as the vocabulary."""


class Chunk(Struct, frozen=True):
    """Tokens [start, start + count) of one sequence."""

    sequence: Sequence
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def samples(self) -> bool:
        """The chunk ends with the last known token, so a new one follows from it."""
        return self.end == len(self.sequence.token_ids)


@dataclass(frozen=True)
class StepPlan:
    chunks: tuple[Chunk, ...]              # in batch order
    admitted: tuple[Sequence, ...]         # of their sequences, those that hold blocks for the first time (again, if preempted)
    preempted: tuple[Sequence, ...]        # gave their blocks back


class Claim(Struct, frozen=True):
    """Of a handoff that waits for a place here."""

    num_blocks: int
    due_at: float


class Scheduler:
    def __init__(
        self, pool: BlockPool, block_size: int, max_step_tokens: int, max_sequences: int, pacer: Pacer | None = None
    ) -> None:
        self._pool = pool
        self._block_size = block_size
        self._max_step_tokens = max_step_tokens
        self._max_sequences = max_sequences
        self.pacer = pacer                     # None: only tokens are budgeted
        self.waiting: list[Sequence] = []      # by urgency
        self.running: list[Sequence] = []      # by arrival
        self.num_reserved = 0                                  # handoffs on their way here that have their blocks
        self._claim: Claim | None = None                       # of the most urgent handoff, for the next step
        self._nobody_more = False                              # the first in line found no memory in the last step

    def add(self, sequence: Sequence) -> None:
        """To be admitted when there is room."""
        insort(self.waiting, sequence, key=lambda s: s.urgency)

    def adopt(self, sequence: Sequence) -> None:
        """Its KV is in `sequence.blocks` already: it decodes from the next step on."""
        self._start(sequence)
        if self.pacer is not None:
            self.pacer.joined()

    def finish(self, sequence: Sequence) -> None:
        """Gives back what it holds, wherever it stands."""
        self.retire(sequence)
        self.give_back(sequence)

    def retire(self, sequence: Sequence) -> None:
        """Ends it, but for its blocks: a step under way may still write to them."""
        if sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        elif sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
        sequence.state = SequenceState.FINISHED

    def answered(self, num_outputs: int) -> None:
        """An answer has come to its own end. (Its sequence may hold a token more, of a step that was launched ahead.)"""
        if self.pacer is not None:
            self.pacer.answered(num_outputs)

    def park(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.state = SequenceState.PARKED

    def schedule(self) -> StepPlan:
        self._postpone_lost()
        claim, self._claim = self._claim, None
        decodes = self._decodes()
        preempted = self._secure_blocks(decodes)
        # What was just preempted would only take the blocks back that a decode needs next.
        welcome = [] if preempted else [s for s in self.waiting if claim is None or s.was_admitted or s.due_at < claim.due_at]
        preempted = preempted or self._yield_to_waiting(claim, welcome)
        chunks = [Chunk(s, s.num_computed, 1) for s in decodes if s.state is SequenceState.RUNNING]      # who has a block for its token
        room, num_decoding, scored_left = self._room(chunks), len(chunks), MAX_SCORED_TOKENS
        admitted, nobody_more = [], False
        for sequence in self._prompts(welcome, num_decoding):
            if room.is_empty:
                break
            most = scored_left if sequence.is_scored else room.tokens
            if most == 0:
                continue                       # it comes first in the next step, and holds up nobody who wants no scores
            if sequence.state is SequenceState.WAITING:
                nobody_more = nobody_more or not self._admit(sequence)         # or small ones would keep a large one waiting for ever
                if nobody_more:
                    continue
                admitted.append(sequence)
            count = room.take(sequence.num_computed, min(sequence.num_to_compute, most))
            scored_left -= count if sequence.is_scored else 0
            chunks.append(Chunk(sequence, sequence.num_computed, count))
        self._nobody_more = nobody_more
        if self.pacer is not None:
            self.pacer.planned(room)
            if any(chunk.samples and not chunk.sequence.hands_off for chunk in chunks[num_decoding:]):
                self.pacer.joined()
        return StepPlan(tuple(chunks), tuple(admitted), tuple(preempted))

    def computed(self, chunk: Chunk) -> None:
        """The chunk's KV is in its blocks; full blocks become matchable."""
        sequence, end = chunk.sequence, chunk.end
        if sequence.num_computed < end:                                    # a later step may have been launched
            sequence.num_computed = end
        num_full = end // self._block_size
        if num_full <= sequence.num_published:
            return
        hashes = sequence.update_hashes(self._block_size)
        for index in range(sequence.num_published, min(num_full, len(hashes))):
            self._pool.publish(sequence.blocks[index], hashes[index])
            sequence.num_published = index + 1

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def claim(self, num_blocks: int, due_at: float) -> None:
        """A handoff that is due then waits for a place and so many blocks: in the next step batch work makes room, if that is enough, and
        nobody who is less urgent is admitted. In place of what was claimed before."""
        self._claim = Claim(num_blocks, due_at)

    @property
    def may_preempt(self) -> bool:
        """Whether the next plan may take places and memory away from batch work, for want of neither."""
        wanted = self._claim is not None or any(not sequence.fills_in for sequence in self.waiting)
        return wanted and any(sequence.fills_in for sequence in self.running)

    def owes_memory(self, due_at: float) -> bool:
        """A preempted sequence waits to come back that is more urgent than what is due then."""
        return any(sequence.was_admitted and sequence.due_at <= due_at for sequence in self.waiting)

    def _decodes(self) -> list[Sequence]:
        """Of a step. One of batch work is always among them, that which has waited longest: so all come to an end."""
        decodes = [s for s in self.running if s.is_decoding][: self._max_sequences]
        filling = sorted((s for s in decodes if s.fills_in), key=lambda s: s.urgency)
        if self.pacer is None or len(filling) < 2:
            return decodes
        most = 1 if self._computes_for_others else self.pacer.num_beside([s for s in decodes if not s.fills_in], filling)
        for sequence in filling[most:]:
            sequence.paced_from = sequence.handed_over_at = None           # it is not late: it gave way
        left_out = set(filling[most:])
        return [s for s in decodes if s not in left_out]

    @property
    def _computes_for_others(self) -> bool:
        """Than batch work: a prompt, or will in this step, unless the first in line found no memory in the last one."""
        coming = [] if self._nobody_more else self.waiting[: max(1, self._num_places)]
        return any(not (s.fills_in or s.is_decoding) for s in (*self.running, *coming))

    def _postpone_lost(self) -> None:
        lost = [s for s in self.waiting if self.pacer is not None and self.pacer.is_lost(s)]
        for sequence in lost:
            sequence.postpone()
        if lost:
            self.waiting.sort(key=lambda s: s.urgency)

    def _room(self, decodes: list[Chunk]) -> StepRoom:
        max_tokens = max(1, self._max_step_tokens - len(decodes))       # a prompt gets on however many decodes there are
        return StepRoom(max_tokens) if self.pacer is None else self.pacer.room((chunk.sequence for chunk in decodes), max_tokens)

    def _prompts(self, welcome: list[Sequence], num_decoding: int) -> Iterable[Sequence]:
        """Those under way, then new ones; batch work under way lets whoever is more urgent pass, if no handoff waits for it."""
        started = sorted((s for s in self.running if not s.is_decoding), key=lambda s: s.urgency)
        started = started[: max(0, self._max_sequences - num_decoding)]
        waiting = welcome[: self._num_places]
        passed = [s for s in started if waiting and _may_yield(s, waiting[0].due_at)]
        return [*(s for s in started if s not in passed), *waiting, *passed]

    def _admit(self, sequence: Sequence) -> bool:
        num_new, prefix = self._missing(sequence)
        if sequence.hands_off and not self._pool.can_take(num_new + self._num_growing, prefix):
            return False                       # it could not make room again for who decodes here
        blocks = self._pool.take(num_new, prefix)
        if blocks is None:
            return False
        sequence.blocks = blocks
        sequence.num_computed = len(prefix) * self._block_size
        sequence.num_published = len(prefix)
        if not sequence.was_admitted:
            sequence.num_cached = sequence.num_computed
            sequence.was_admitted = True
        self.waiting.remove(sequence)
        self._start(sequence)
        return True

    @property
    def _num_places(self) -> int:
        """For sequences more, beside handoffs that have theirs already."""
        return max(0, self._max_sequences - len(self.running) - self.num_reserved)

    @property
    def _num_growing(self) -> int:
        return sum(not sequence.hands_off for sequence in self.running)

    def _missing(self, sequence: Sequence) -> tuple[int, list[BlockId]]:
        """Blocks to take so that it can run, and those that are here already."""
        hashes = sequence.update_hashes(self._block_size)
        # At least one token is computed, for its logits.
        usable = 0 if sequence.is_scored else (len(sequence.token_ids) - 1) // self._block_size
        prefix = self._pool.match(hashes[:usable])
        return self.blocks_for(len(sequence.token_ids)) - len(prefix), prefix

    def _yield_to_waiting(self, claim: Claim | None, welcome: list[Sequence]) -> list[Sequence]:
        """Batch work makes room for the handoff that claims it and for the first in line."""
        yielded: list[Sequence] = []
        head = welcome[0] if welcome else None
        if head is not None and head.is_scored and self._num_scored_before(head) >= MAX_SCORED_TOKENS:
            head = next((s for s in welcome if not s.is_scored), None)             # those behind it pass no more than it does
        if claim is not None:
            yielded += self._yield_to(claim.num_blocks, [], claim.due_at)
        if head is not None and not head.fills_in:
            yielded += self._yield_to(*self._missing(head), head.due_at, grows=head.hands_off)
        return yielded

    def _num_scored_before(self, waiting: Sequence) -> int:
        """Tokens under way whose scores it does not pass."""
        under_way = (s for s in self.running if s.is_scored and not s.is_decoding and not _may_yield(s, waiting.due_at))
        return sum(s.num_to_compute for s in under_way)

    def _yield_to(self, num_blocks: int, prefix: list[BlockId], due_at: float, grows: bool = False) -> list[Sequence]:
        """`grows`: who runs then must have blocks to grow into, too, as `_admit` asks of a prompt that is handed off."""
        victims = sorted((s for s in self.running if _may_yield(s, due_at)), key=lambda s: s.urgency, reverse=True)
        stay = self._num_growing - sum(not s.hands_off for s in victims) if grows else 0
        wanted = num_blocks + stay - self._pool.num_available
        if wanted > sum(len(s.blocks) for s in victims) or wanted > self._pool.num_freed_by(s.blocks for s in victims):
            return []
        yielded: list[Sequence] = []
        for victim in victims:
            if self._num_places and self._pool.can_take(num_blocks + (self._num_growing if grows else 0), prefix):
                break
            self._preempt(victim)
            yielded.append(victim)
        return yielded

    def _secure_blocks(self, decodes: list[Sequence]) -> list[Sequence]:
        """Each of these gets a block for its newest token; who has most slack makes room if that must be, also one of these."""
        preempted: list[Sequence] = []
        for sequence in decodes:
            while sequence.state is SequenceState.RUNNING and not self._grow(sequence):
                victim = max((s for s in self.running if not s.hands_off), key=lambda s: s.urgency)
                preempted.append(victim)
                self._preempt(victim)
        return preempted

    @property
    def can_grow_all(self) -> bool:
        """Nobody has to make room for the newest token of somebody who runs."""
        available = self._pool.num_available
        return available >= len(self.running) or available >= sum(map(self._num_missing, self.running))

    def _num_missing(self, sequence: Sequence) -> int:
        """Blocks, for all of its tokens."""
        return max(0, self.blocks_for(len(sequence.token_ids)) - len(sequence.blocks))

    def _grow(self, sequence: Sequence) -> bool:
        missing = self._num_missing(sequence)
        if not missing:
            return True
        taken = self._pool.take(missing)
        if taken is not None:
            sequence.blocks += taken
        return taken is not None

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.state = SequenceState.WAITING
        self.give_back(sequence)
        self.add(sequence)

    def give_back(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = sequence.num_published = 0
        sequence.paced_from = sequence.handed_over_at = None

    def _start(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.RUNNING
        insort(self.running, sequence, key=lambda s: s.arrival)


def _may_yield(sequence: Sequence, due_at: float) -> bool:
    return sequence.fills_in and not sequence.hands_off and sequence.due_at > due_at
