"""One model replica: sequences in, tokens out.

    add / adopt ──► plan() ──► launch(plan) ─ ─ ─► collect() ──► one SequenceStep per chunk, with a TokenDelta if a token follows
                       │            └─ model_runner computes, `on_layer` is told of each finished layer
                       └─ scheduler decides

A runner that runs ahead (a GPU's) is given step n+1 before step n has been collected: the plan needs only how many tokens there are,
and each that the host does not know yet stands as PENDING. A sequence that turns out to have ended at step n has been computed once
too often; that result is dropped, and its blocks come back with the step that wrote to them last.
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from msgspec import Struct

from ..messages.errors import ContextOverflow, PoolTooSmall
from ..messages.ids import Address, BlockHash, BlockId, RequestId
from ..messages.requests import FinishReason, GenerateRequest, TokenDelta, TokenLogprobs
from .block_pool import BlockPool
from .model_runner import ChunkOutput, ModelRunner, StepOutputs
from .sampler import Sampled
from .scheduler import Chunk, Scheduler, StepPlan
from .sequence import PENDING, Sequence, SequenceState

MAX_GATEWAYS = 16
"""Whose newest request is remembered: those that were heard of last."""


@dataclass(frozen=True)
class EngineLimits:
    block_size: int            # tokens
    max_model_len: int         # tokens
    max_step_tokens: int
    max_sequences: int
    prefix_cache: bool = True


class SequenceStep(Struct, frozen=True):
    """What a step did for one sequence."""

    chunk: Chunk
    delta: TokenDelta | None       # None: the prompt is not finished, or the model broke down
    broke_down: bool = False       # the model gave logits that are no numbers: nothing can follow

    @property
    def sequence(self) -> Sequence:
        return self.chunk.sequence


@dataclass
class _Launched:
    chunks: tuple[Chunk, ...]
    samples: tuple[bool, ...]                                 # of each chunk, as it was when the step was launched
    retired: list[Sequence] = field(default_factory=list)     # ended since; their blocks are held until this step is over
    outputs: StepOutputs | None = None                        # None: still being launched


class Engine:
    """Raises PoolTooSmall if the longest allowed sequence does not fit into the pool alone."""

    def __init__(self, runner: ModelRunner, num_blocks: int, limits: EngineLimits) -> None:
        self.limits = limits
        self.pool = BlockPool(num_blocks, limits.prefix_cache)
        self.scheduler = Scheduler(self.pool, limits.block_size, limits.max_step_tokens, limits.max_sequences)
        self.runner = runner
        self._sequences: dict[RequestId, Sequence] = {}
        self._num_arrived = 0
        self._last_added: dict[Address, tuple[RequestId, float]] = {}      # of each gateway, and when; the latest comes last
        self._under_way: deque[_Launched] = deque()           # two at most; the oldest first
        self._computed: list[Chunk] = []                      # collected, and not published yet
        needed = self.scheduler.blocks_for(limits.max_model_len)
        if needed > num_blocks:
            raise PoolTooSmall(
                f"max_model_len {limits.max_model_len} needs {needed} blocks of {limits.block_size} tokens, the pool has {num_blocks}"
            )

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting or self._under_way)

    @property
    def sequences(self) -> list[Sequence]:
        return list(self._sequences.values())

    @property
    def last_added(self) -> tuple[tuple[RequestId, float], ...]:
        """The newest request of each gateway, and when it was added."""
        return tuple(self._last_added.values())

    def find(self, request_id: RequestId) -> Sequence | None:
        return self._sequences.get(request_id)

    def add(self, request: GenerateRequest, now: float, hands_off: bool = False) -> Sequence:
        """To be computed from its prompt on. Raises ContextOverflow."""
        sequence = self._admit_to_books(request, now, hands_off)
        self.scheduler.add(sequence)
        self._last_added.pop(request.gateway, None)
        self._last_added[request.gateway] = (request.request_id, now)
        if len(self._last_added) > MAX_GATEWAYS:
            del self._last_added[next(iter(self._last_added))]
        return sequence

    def adopt(
        self, request: GenerateRequest, first: TokenDelta, blocks: list[BlockId], now: float, hashes: Seq[BlockHash] = (),
        own_tokens: list[int] | None = None,
    ) -> Sequence:  # fmt: skip
        """To be decoded after `first`, with the KV of request.token_ids in `blocks` (held by the caller until now). What is known already:
        `hashes` of its full blocks, `tokens_of` the request."""
        sequence = self._admit_to_books(request, now, hands_off=False, own_tokens=own_tokens)
        sequence.blocks = blocks
        sequence.hashes = list(hashes)
        sequence.was_admitted = True
        sequence.num_computed = len(request.token_ids)
        sequence.token_ids += first.token_ids
        sequence.handed_over_at = now
        self.scheduler.adopt(sequence)
        return sequence

    def finish(self, sequence: Sequence) -> None:
        """Ends it wherever it stands. Its blocks come back once no step under way can write to them."""
        self.publish()
        del self._sequences[sequence.id]
        self.scheduler.retire(sequence)
        if self._under_way:
            self._under_way[-1].retired.append(sequence)
        else:
            self.scheduler.give_back(sequence)

    @property
    def may_plan(self) -> bool:
        """Whether the next step can be planned now: with a step under way, only by a runner that runs ahead, while nobody has to make
        room (a preempted sequence starts over from its tokens, which the host must know)."""
        if not self._under_way:
            return True
        is_one_ahead = self.runner.runs_ahead and len(self._under_way) == 1
        return is_one_ahead and self.scheduler.can_grow_all and not self.scheduler.may_preempt

    @property
    def is_ready(self) -> bool:
        """The oldest step under way has been computed."""
        outputs = self._under_way[0].outputs if self._under_way else None
        return outputs is not None and outputs.is_ready()

    @property
    def is_computing(self) -> bool:
        return bool(self._under_way)

    def plan(self) -> StepPlan:
        self.publish()
        return self.scheduler.schedule()

    def launch(self, plan: StepPlan, on_layer: Callable[[int], None] | None = None) -> None:
        """Starts a step. What `on_layer` does may end sequences, and collect the step before."""
        step = _Launched(plan.chunks, tuple(chunk.samples for chunk in plan.chunks))
        self._under_way.append(step)
        step.outputs = self.runner.launch(plan, on_layer)
        for chunk, samples in zip(plan.chunks, step.samples, strict=True):
            if chunk.sequence.state is SequenceState.RUNNING:
                self._look_ahead(chunk, samples)

    def rouse(self) -> None:
        """A step is expected soon."""
        if not self._under_way:
            self.runner.rouse()

    def collect(self) -> list[SequenceStep]:
        """Waits for the oldest step under way; sequences that ended meanwhile are passed over."""
        step = self._under_way[0]
        assert step.outputs is not None, "the step is still being launched"
        outputs = step.outputs.wait()
        self._under_way.popleft()
        steps = [
            self._advance(chunk, output)
            for chunk, output in zip(step.chunks, outputs, strict=True)
            if chunk.sequence.state is not SequenceState.FINISHED
        ]
        for sequence in step.retired:
            self.scheduler.give_back(sequence)
        return steps

    def publish(self) -> None:
        """What has been collected becomes matchable, before anything is planned or given back at the latest. Apart, for clients wait for
        the tokens that came with it, and the blocks of a long prompt that was handed over take 50 µs."""
        for chunk in self._computed:
            self.scheduler.computed(chunk)
        self._computed.clear()

    def execute(self, plan: StepPlan, on_layer: Callable[[int], None] | None = None) -> list[SequenceStep]:
        """A step from its launch to its end, with nothing else under way."""
        assert not self._under_way, f"{len(self._under_way)} steps are under way"
        self.launch(plan, on_layer)
        return self.collect()

    def _look_ahead(self, chunk: Chunk, samples: bool) -> None:
        """What the next plan may count on, whichever token comes."""
        sequence = chunk.sequence
        sequence.num_computed = chunk.end
        if not samples:
            return
        if sequence.request.sampling.max_tokens > 0:
            sequence.token_ids.append(PENDING)
        if sequence.hands_off or len(sequence.token_ids) >= sequence.max_len:
            self.scheduler.park(sequence)

    def _advance(self, chunk: Chunk, output: ChunkOutput) -> SequenceStep:
        sequence = chunk.sequence
        if not output.is_finite:
            return SequenceStep(chunk, None, broke_down=True)
        delta = None
        if output.sampled is not None and sequence.request.sampling.max_tokens > 0:
            sequence.token_ids[chunk.end] = output.sampled.token_id
        self._computed.append(chunk)
        if output.prompt:
            sequence.add_prompt_logprobs(chunk.start, [_logprobs(s) for s in output.prompt])
        if output.sampled is not None:
            delta = self._delta(sequence, chunk.end, output.sampled)
            if delta.finish:
                self.scheduler.answered(delta.index + len(delta.token_ids))
                self.finish(sequence)
        return SequenceStep(chunk, delta)

    def _delta(self, sequence: Sequence, end: int, sampled: Sampled) -> TokenDelta:
        """`sampled` follows on `end` tokens."""
        request, index = sequence.request, end - sequence.num_prompt_tokens
        wanted = request.sampling.max_tokens > 0
        token_ids, finish = (sampled.token_id,) if wanted else (), self._finish_reason(sequence, end, sampled.token_id)
        is_first = end == len(request.token_ids)
        if not is_first and sampled.logprob is None:
            return TokenDelta(request.request_id, index, token_ids, finish)
        return TokenDelta(
            request_id=request.request_id,
            index=index,
            token_ids=token_ids,
            finish=finish,
            logprobs=(_logprobs(sampled),) if wanted and sampled.logprob is not None else (),
            num_cached_tokens=sequence.num_cached if is_first else 0,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if is_first else (),
        )

    def _finish_reason(self, sequence: Sequence, end: int, token_id: int) -> FinishReason | None:
        sampling = sequence.request.sampling
        if token_id in sampling.stop_token_ids and sampling.max_tokens > 0 and end + 1 - sequence.num_prompt_tokens > sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if end + 1 >= sequence.max_len else None

    def _admit_to_books(self, request: GenerateRequest, now: float, hands_off: bool, own_tokens: list[int] | None = None) -> Sequence:
        num_tokens, limit = len(request.token_ids), self.limits.max_model_len
        if not 0 < num_tokens <= limit:
            raise ContextOverflow(f"{num_tokens} tokens; this worker takes 1 to {limit}")
        self._num_arrived += 1
        ttft = request.ttft_slo_s if request.ttft_slo_s is not None else float("inf")
        max_len = min(request.num_prompt_tokens + request.sampling.max_tokens, limit)
        sequence = Sequence(request, self._num_arrived, now + request.timeout_s, now + ttft, hands_off, max_len, own_tokens=own_tokens)
        self._sequences[sequence.id] = sequence
        return sequence


def _logprobs(sampled: Sampled) -> TokenLogprobs:
    assert sampled.logprob is not None or not sampled.top
    return TokenLogprobs(sampled.token_id, sampled.logprob or 0.0, sampled.top)
