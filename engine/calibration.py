"""What a worker measures before it serves: a small grid of steps, on blocks that nobody holds yet.

    grid: prompts of several lengths, decodes of several counts and contexts ──► each step a few times, the shortest counts ──► StepModel

All sequences of a step share the same blocks: their KV is nonsense, only the time matters. A grid point is begun only within `budget_s`.
The first run of a step compiles, allocates and fills caches; others may be held up, for all workers of a host start at once.
"""

import math
import statistics
from collections.abc import Callable, Iterator

from msgspec.structs import replace

from ..messages.ids import Address, BlockId, Epoch, RequestId, WorkerId
from ..messages.requests import GenerateRequest, Route, SamplingParams, WorkerRef
from ..messages.steps import StepFeatures, StepModel
from .engine import EngineLimits
from .model_runner import ModelRunner
from .predictor import PRIOR, StepPredictor, coefficients, features_of, model_with
from .prompt_steps import MOST_TOKENS
from .scheduler import Chunk, StepPlan
from .sequence import Sequence

GREEDY = SamplingParams(max_tokens=2, seed=0, temperature=0.0)
SCORED = replace(GREEDY, prompt_logprobs=0)
ALL_EXTRAS = replace(GREEDY, logprobs=1, frequency_penalty=1.0, logit_bias={0: 1.0})
NOBODY = WorkerRef(WorkerId("calibration"), Epoch(0), Address(""))
RUNS, MOST_RUNS = 2, 4
"""Of a grid point: further ones while they have taken no more than a POINT_SHARE of the budget together."""

POINT_SHARE = 0.1

ROUNDS = 40
"""How often the fit is told the grid: by then the prior no longer counts."""

ROWS_APART = 256               # of the steps that no graph takes
SCORED_ROWS = (17, 48, 100, 1000)    # of logits: with each the product of the head is another kernel

SMALL_CONTEXT, SMALL_PROMPT, SMALL_BATCH = 16, 64, 8      # tokens, tokens, sequences

CUT_CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)


def calibrate(runner: ModelRunner, limits: EngineLimits, clock: Callable[[], float], budget_s: float) -> StepModel:
    end, measured = clock() + budget_s, []
    for plan in _grid(limits):
        if clock() >= end:
            break
        measured.append((features_of(plan), shortest_s(runner, plan, clock, RUNS, MOST_RUNS, budget_s * POINT_SHARE)))
    return _fit(measured) if measured else PRIOR


def shortest_s(runner: ModelRunner, plan: StepPlan, clock: Callable[[], float], least: int, most: int, enough_s: float) -> float:
    """Of at least so many runs, and further ones until they have taken `enough_s` together."""
    runs_s: list[float] = []
    while len(runs_s) < least or (len(runs_s) < most and sum(runs_s) < enough_s):
        started = clock()
        runner.launch(plan, None).wait()
        runs_s.append(clock() - started)
    return min(runs_s)


def small_steps(limits: EngineLimits) -> list[StepPlan]:
    """One decode, a short prompt, some decodes: with each more of what a step costs can be told apart."""
    longest = limits.max_model_len - 1
    batch = min(SMALL_BATCH, limits.max_sequences, limits.max_step_tokens)
    return [
        _plan([_decode(min(SMALL_CONTEXT, longest), limits)]),
        _plan([_prompt(min(SMALL_PROMPT, longest, limits.max_step_tokens), limits)]),
        _plan([_decode(min(SMALL_PROMPT, longest), limits) for _ in range(batch)]),
    ]


def warm_up(runner: ModelRunner, limits: EngineLimits) -> None:
    """One of each kind of step that a GPU compiles something for, so that no request waits for a compiler: short and long prompts, several
    prompts that fill a step, the end of a long one, and decodes of few and many sequences, with short and long contexts, beside a prompt.
    The latter ask for their prompts' logprobs: otherwise a graph would take the step, and all its kernels are compiled already. And decodes
    that ask for all that is done outside of graphs: how many there are decides how many programs share a row that is sampled.

    Steps too large for a graph come in many sizes: a library picks its kernels by the number of rows, and CUDA loads each when it is first
    launched, once the device is idle. The host would wait for the step before (up to 0.2 s, seen on an H100)."""
    longest, budget = limits.max_model_len - 1, min(limits.max_step_tokens, limits.max_model_len - 1)
    for num_tokens in sorted({min(count, budget) for count in (1, 17, 1000, budget)}):
        runner.launch(_plan([_prompt(num_tokens, limits)]), None).wait()
    for several in range(2, min(4, limits.max_sequences, budget) + 1):
        runner.launch(_plan([_prompt(budget // several, limits) for _ in range(several)]), None).wait()
    pair = min(2, limits.max_sequences)
    for num_tokens in range(MOST_TOKENS + ROWS_APART, budget, ROWS_APART):
        runner.launch(_plan([_prompt(num_tokens // pair, limits)] * pair), None).wait()
    beside, *scored = (_prompt(min(count, budget), limits, SCORED) for count in SCORED_ROWS)
    for chunk in (beside, *scored, _chunk(longest, min(2, budget), limits, SCORED), _prompt(min(17, budget), limits, ALL_EXTRAS)):
        runner.launch(_plan([chunk]), None).wait()
    for count in _batches(min(limits.max_sequences, limits.max_step_tokens)):
        runner.launch(_plan([_decode(1, limits, ALL_EXTRAS) for _ in range(count)]), None).wait()
    contexts, count = _contexts(longest), 1
    while count < min(limits.max_sequences, limits.max_step_tokens - 17):
        for context in contexts if count == 1 else (1, longest):
            runner.launch(_plan([*[_decode(context, limits)] * count, beside]), None).wait()
        count *= 2


def _batches(most: int) -> list[int]:
    """1, 2, 4 … and the largest."""
    return sorted({*(1 << power for power in range(most.bit_length())), most})


def _contexts(longest: int) -> list[int]:
    """From 1 to `longest`: alone, a sequence's context is cut into 1, 2, 4 … shares as it grows."""
    return [1, *(context for context in CUT_CONTEXTS if context < longest), longest]


def _fit(measured: list[tuple[StepFeatures, float]]) -> StepModel:
    """From a prior as slow as this machine: the standing term of a much faster one would hold the fit back."""
    slower = statistics.median(seconds / PRIOR.step_s(features) for features, seconds in measured)
    predictor = StepPredictor(model_with((slower * each for each in coefficients(PRIOR)), PRIOR.error, 0) if slower > 0 else PRIOR)
    for features, seconds in measured * ROUNDS:
        predictor.observe(features, seconds)
    model = predictor.model
    off = [abs(seconds / model.step_s(features) - 1) for features, seconds in measured]
    return replace(model, error=sum(off) / len(off), num_observed=len(measured))


def _grid(limits: EngineLimits) -> Iterator[StepPlan]:
    """The cheapest first."""
    longest = limits.max_model_len - 1
    batch, budget = min(limits.max_sequences, limits.max_step_tokens), min(limits.max_step_tokens, longest)
    for count, context in ((1, SMALL_CONTEXT), (batch, SMALL_CONTEXT), (1, longest // 4), (math.isqrt(batch), longest // 4)):
        yield _plan([_decode(min(context, longest), limits) for _ in range(max(1, count))])
    for tokens in (budget // 16, budget // 8, budget // 4, budget // 2, budget):
        yield _plan([_prompt(max(1, tokens), limits)])


def _plan(chunks: list[Chunk]) -> StepPlan:
    return StepPlan(tuple(chunks), (), ())


def _prompt(num_tokens: int, limits: EngineLimits, sampling: SamplingParams = GREEDY) -> Chunk:
    return Chunk(_sequence(num_tokens, limits, sampling), 0, num_tokens)


def _chunk(end: int, num_tokens: int, limits: EngineLimits, sampling: SamplingParams) -> Chunk:
    """The last tokens of a prompt of `end` tokens: its context may be cut for attention, that of a short prompt is not."""
    sequence = _sequence(end, limits, sampling)
    sequence.num_computed = end - num_tokens
    return Chunk(sequence, sequence.num_computed, num_tokens)


def _decode(context: int, limits: EngineLimits, sampling: SamplingParams = GREEDY) -> Chunk:
    sequence = _sequence(max(1, context), limits, sampling)
    sequence.num_computed = len(sequence.token_ids)
    sequence.token_ids.append(0)
    return Chunk(sequence, sequence.num_computed, 1)


def _sequence(num_tokens: int, limits: EngineLimits, sampling: SamplingParams = GREEDY) -> Sequence:
    request = GenerateRequest(
        request_id=RequestId("calibration"),
        gateway=Address(""),
        token_ids=(0,) * num_tokens,
        sampling=sampling,
        route=Route(decode=NOBODY),
        timeout_s=math.inf,
    )
    blocks = [BlockId(i) for i in range(num_tokens // limits.block_size + 1)]
    return Sequence(request, 0, math.inf, math.inf, hands_off=False, max_len=limits.max_model_len, blocks=blocks)
