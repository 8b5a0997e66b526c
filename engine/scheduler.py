"""What an engine computes next. Pure: sequences and a block pool in, one StepPlan out.

A step takes every running decode (one token each), then continues prompts that are partly computed, then admits waiting ones by
urgency, all under a token budget (SARATHI, OSDI'24, section 4). Admission takes the blocks of the whole prompt at once, so that a
prompt under way is never stuck halfway. A decode that finds no block preempts the latest arrival, which computes again later.
"""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass

from .block_pool import BlockPool
from .sequence import Sequence, SequenceState


@dataclass(frozen=True)
class Chunk:
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


class Scheduler:
    def __init__(self, pool: BlockPool, block_size: int, max_step_tokens: int, max_sequences: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._max_step_tokens = max_step_tokens
        self._max_sequences = max_sequences
        self.waiting: list[Sequence] = []      # by urgency
        self.running: list[Sequence] = []      # by arrival

    def add(self, sequence: Sequence) -> None:
        """To be admitted when there is room."""
        insort(self.waiting, sequence, key=lambda s: s.urgency)

    def adopt(self, sequence: Sequence) -> None:
        """Its KV is in `sequence.blocks` already: it decodes from the next step on."""
        self._start(sequence)

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

    def park(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.state = SequenceState.PARKED

    def schedule(self) -> StepPlan:
        preempted = self._secure_decode_blocks()
        chunks = [Chunk(s, s.num_computed, 1) for s in self.running if s.is_decoding][: self._max_sequences]
        room = max(1, self._max_step_tokens - len(chunks))     # a prompt gets on however many decodes there are
        admitted = []
        for sequence in self._prompts(preempted, len(chunks)):
            if room == 0:
                break
            if sequence.state is SequenceState.WAITING:
                if not self._admit(sequence):
                    break
                admitted.append(sequence)
            chunks.append(Chunk(sequence, sequence.num_computed, min(sequence.num_to_compute, room)))
            room -= chunks[-1].count
        return StepPlan(tuple(chunks), tuple(admitted), tuple(preempted))

    def computed(self, chunk: Chunk) -> None:
        """The chunk's KV is in its blocks; full blocks become matchable."""
        sequence = chunk.sequence
        sequence.num_computed = max(sequence.num_computed, chunk.end)      # a later step may have been launched
        hashes = sequence.update_hashes(self._block_size)
        for index in range(sequence.num_published, min(chunk.end // self._block_size, len(hashes))):
            self._pool.publish(sequence.blocks[index], hashes[index])
            sequence.num_published = index + 1

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _prompts(self, preempted: list[Sequence], num_decoding: int) -> Iterable[Sequence]:
        started = sorted((s for s in self.running if not s.is_decoding), key=lambda s: s.urgency)
        num_new = max(0, self._max_sequences - len(self.running))
        # What was just preempted would only take the blocks back that a decode needs next.
        waiting = [] if preempted else self.waiting[:num_new]
        return [*started[: max(0, self._max_sequences - num_decoding)], *waiting]

    def _admit(self, sequence: Sequence) -> bool:
        hashes = sequence.update_hashes(self._block_size)
        wants_all_logits = sequence.request.sampling.prompt_logprobs is not None
        # At least one token is computed, for its logits.
        usable = 0 if wants_all_logits else (len(sequence.token_ids) - 1) // self._block_size
        prefix = self._pool.match(hashes[:usable])
        blocks = self._pool.take(self.blocks_for(len(sequence.token_ids)) - len(prefix), prefix)
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

    def _secure_decode_blocks(self) -> list[Sequence]:
        """Every decode of this step gets a block for its newest token; the latest arrivals make room if they must."""
        preempted: list[Sequence] = []
        for sequence in [s for s in self.running if s.is_decoding][: self._max_sequences]:
            while sequence.state is SequenceState.RUNNING and not self._grow(sequence):
                preempted.append(self.running[-1])
                self._preempt(self.running[-1])
        return preempted

    def _grow(self, sequence: Sequence) -> bool:
        missing = self.blocks_for(len(sequence.token_ids)) - len(sequence.blocks)
        if missing <= 0:
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

    def _start(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.RUNNING
        insort(self.running, sequence, key=lambda s: s.arrival)
