"""One model replica: sequences in, tokens out.

    add / adopt ──► plan() ──► execute(plan) ──► one SequenceStep per chunk, with a TokenDelta if a token follows
                       │            └─ model_runner computes, `on_layer` is told of each finished layer
                       └─ scheduler decides
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..messages.errors import ContextOverflow, PoolTooSmall
from ..messages.ids import BlockId, RequestId
from ..messages.requests import FinishReason, GenerateRequest, TokenDelta, TokenLogprobs
from .block_pool import BlockPool
from .model_runner import ChunkOutput, ModelRunner
from .sampler import Sampled
from .scheduler import Chunk, Scheduler, StepPlan
from .sequence import Sequence, SequenceState


@dataclass(frozen=True)
class EngineLimits:
    block_size: int            # tokens
    max_model_len: int         # tokens
    max_step_tokens: int
    max_sequences: int
    prefix_cache: bool = True


@dataclass(frozen=True)
class SequenceStep:
    """What a step did for one sequence."""

    chunk: Chunk
    delta: TokenDelta | None       # None: the prompt is not finished, or the model broke down
    broke_down: bool = False       # the model gave logits that are no numbers: nothing can follow

    @property
    def sequence(self) -> Sequence:
        return self.chunk.sequence


class Engine:
    """Raises PoolTooSmall if the longest allowed sequence does not fit into the pool alone."""

    def __init__(self, runner: ModelRunner, num_blocks: int, limits: EngineLimits) -> None:
        self.limits = limits
        self.pool = BlockPool(num_blocks, limits.prefix_cache)
        self.scheduler = Scheduler(self.pool, limits.block_size, limits.max_step_tokens, limits.max_sequences)
        self._runner = runner
        self._sequences: dict[RequestId, Sequence] = {}
        self._num_arrived = 0
        needed = self.scheduler.blocks_for(limits.max_model_len)
        if needed > num_blocks:
            raise PoolTooSmall(
                f"max_model_len {limits.max_model_len} needs {needed} blocks of {limits.block_size} tokens, the pool has {num_blocks}"
            )

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    @property
    def sequences(self) -> list[Sequence]:
        return list(self._sequences.values())

    def find(self, request_id: RequestId) -> Sequence | None:
        return self._sequences.get(request_id)

    def add(self, request: GenerateRequest, now: float, hands_off: bool = False) -> Sequence:
        """To be computed from its prompt on. Raises ContextOverflow."""
        sequence = self._admit_to_books(request, now, hands_off)
        self.scheduler.add(sequence)
        return sequence

    def adopt(self, request: GenerateRequest, first: TokenDelta, blocks: list[BlockId], now: float) -> Sequence:
        """To be decoded after `first`, with the KV of request.token_ids in `blocks` (held by the caller until now)."""
        sequence = self._admit_to_books(request, now, hands_off=False)
        sequence.blocks = blocks
        sequence.was_admitted = True
        self.scheduler.computed(Chunk(sequence, 0, len(request.token_ids)))
        sequence.token_ids += first.token_ids
        self.scheduler.adopt(sequence)
        return sequence

    def finish(self, sequence: Sequence) -> None:
        """Ends it wherever it stands, and gives its blocks back."""
        del self._sequences[sequence.id]
        self.scheduler.finish(sequence)

    def plan(self) -> StepPlan:
        return self.scheduler.schedule()

    def execute(self, plan: StepPlan, on_layer: Callable[[int], None] | None = None) -> list[SequenceStep]:
        outputs = self._runner.execute(plan, on_layer)
        return [self._advance(chunk, output) for chunk, output in zip(plan.chunks, outputs, strict=True)]

    def _advance(self, chunk: Chunk, output: ChunkOutput) -> SequenceStep:
        sequence = chunk.sequence
        if not output.is_finite:
            return SequenceStep(chunk, None, broke_down=True)
        self.scheduler.computed(chunk)
        sequence.add_prompt_logprobs(chunk.start, [_logprobs(s) for s in output.prompt])
        if output.sampled is None:
            return SequenceStep(chunk, None)
        delta = self._append(sequence, output.sampled)
        if delta.finish:
            self.finish(sequence)
        elif sequence.hands_off and sequence.state is SequenceState.RUNNING:
            self.scheduler.park(sequence)
        return SequenceStep(chunk, delta)

    def _append(self, sequence: Sequence, sampled: Sampled) -> TokenDelta:
        request, index = sequence.request, sequence.num_outputs
        is_first = len(sequence.token_ids) == len(request.token_ids)
        wanted = request.sampling.max_tokens > 0
        if wanted:
            sequence.token_ids.append(sampled.token_id)
        return TokenDelta(
            request_id=request.request_id,
            index=index,
            token_ids=(sampled.token_id,) if wanted else (),
            finish=self._finish_reason(sequence, sampled.token_id),
            logprobs=(_logprobs(sampled),) if wanted and sampled.logprob is not None else (),
            num_cached_tokens=sequence.num_cached if is_first else 0,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if is_first else (),
        )

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        sampling = sequence.request.sampling
        if sampling.max_tokens > 0 and token_id in sampling.stop_token_ids and sequence.num_outputs > sampling.min_tokens:
            return FinishReason.STOP
        if sequence.num_outputs >= sampling.max_tokens or len(sequence.token_ids) >= self.limits.max_model_len:
            return FinishReason.LENGTH
        return None

    def _admit_to_books(self, request: GenerateRequest, now: float, hands_off: bool) -> Sequence:
        num_tokens, limit = len(request.token_ids), self.limits.max_model_len
        if not 0 < num_tokens <= limit:
            raise ContextOverflow(f"{num_tokens} tokens; this worker takes 1 to {limit}")
        self._num_arrived += 1
        ttft = request.ttft_slo_s if request.ttft_slo_s is not None else float("inf")
        sequence = Sequence(request, self._num_arrived, now + request.timeout_s, now + ttft, hands_off)
        self._sequences[sequence.id] = sequence
        return sequence


def _logprobs(sampled: Sampled) -> TokenLogprobs:
    assert sampled.logprob is not None or not sampled.top
    return TokenLogprobs(sampled.token_id, sampled.logprob or 0.0, sampled.top)
