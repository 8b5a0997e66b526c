"""What would happen to a request on a worker? Pure arithmetic on a WorkerLoad and its step model; seconds count from now.

    prefill    queue ahead (in deadline order) + own uncached tokens, cut into steps that the worker's decodes share  →  time to first token
    join       max(prefill end, transfer)                                                                           →  KV arrival
    decode     a step with one sequence more, stretched by the prompts that its pace allows beside it               →  time per token

The decode load is taken at the join: by then some of today's sequences have ended, and those under way have come. (A router that
looks at today's load only lets prefill fill up, then starves it, and so on: Mooncake, FAST'25, section 7.)
"""

import math

from msgspec import Struct

from ...engine.load import SHARE_HORIZON_S
from ...engine.pace import beside_s
from ...engine.predictor import PRIOR
from ...messages.steps import StepModel, attended_pairs
from .policy import WorkerLoad

MAX_PREFILL_SHARE = 0.95


class Work(Struct, frozen=True):
    """What a request needs, before it is known where."""

    num_tokens: int                           # prompt
    num_outputs: float                        # expected
    ttft_slack_s: float                       # until the first token is due; infinite without an objective
    tpot_s: float = math.inf                  # promised


class Inflow(Struct, frozen=True):
    """What all gateways send to one worker of a pool: guessed from what this one sends, for they are alike."""

    tokens_per_s: float = 0.0                 # prompt tokens
    tokens_each: float = 0.0                  # of a prompt: mean of squares by mean
    num_others: int = 0                       # gateways, of whose share a report must come to show it
    num_joining: float = 0.0                  # sequences on their way to a decode worker


NOTHING = Inflow()


class PrefillEstimate(Struct, frozen=True):
    backlog_s: float                          # all that waits at the worker, served before this request or not
    own_s: float                              # what the request adds to it
    ttft_s: float


class DecodeEstimate(Struct, frozen=True):
    before_s: float                           # per token, without the request: what prompts take counted as lately
    after_s: float                            # with it
    tpot_s: float                             # with it, as the worker paces itself: prompts get no more than the promise leaves


class DecodeSide(Struct, frozen=True):
    """What is known of a request on a decode worker whoever computes its prompt."""

    model: StepModel
    num_decoding: int
    life_s: float                             # of an answer, at today's pace
    num_joining: float                        # sequences on their way
    context_each: float                       # of those that decode then
    own_context: float                        # of the request, while it decodes
    share: float                              # of the worker's time that goes to prompts
    tpot_s: float                             # promised


def estimate_prefill(worker: WorkerLoad, work: Work, num_cached: int, now: float, inflow: Inflow = NOTHING) -> PrefillEstimate:
    model = model_of(worker)
    age_s = 0.0 if worker.reported_at is None else now - worker.reported_at
    unseen = _unseen_tokens(worker, inflow, age_s)
    uncached = work.num_tokens - num_cached
    pairs = attended_pairs(num_cached, uncached)
    own_s = model.prefill_s(uncached, pairs)
    waiting = worker.num_waiting_tokens
    ahead = waiting - _tokens_behind(worker, work, now)
    shared_s = _decode_s_soon(worker, model)
    room = max(1, worker.max_step_tokens - worker.num_decoding) if worker.max_step_tokens else max(1, ahead + uncached)
    each_s = beside_s(shared_s, work.tpot_s) if worker.num_decoding else math.inf
    waiting_s = model.prefill_s(waiting, worker.prefill_pairs)
    waiting_s += max(waiting // room, waiting_s / each_s) * shared_s
    left_s = max(0.0, worker.busy_s + waiting_s - age_s)
    backlog_s = left_s + model.prefill_token_s * unseen
    ahead_s = backlog_s - min(left_s, waiting_s * (waiting - ahead) / max(1, waiting))
    num_steps = max(math.ceil(uncached / room), own_s / each_s)
    if ahead:                                 # the token comes at the end of its step, which later prompts may fill up
        extra_s = model.prefill_token_s * min(-(ahead + unseen + uncached) % room, inflow.tokens_per_s * ahead_s)
    else:                                     # on average a step of decodes is half done
        extra_s = max(0.0, shared_s / 2 - left_s) if worker.num_decoding else 0.0
    return PrefillEstimate(backlog_s, own_s, ahead_s + own_s + extra_s + num_steps * shared_s)


def decode_side(worker: WorkerLoad, work: Work, inflow: Inflow = NOTHING) -> DecodeSide:
    model, count = model_of(worker), worker.num_decoding
    own_context = work.num_tokens + work.num_outputs / 2
    return DecodeSide(
        model=model,
        num_decoding=count,
        life_s=work.num_outputs * model.decode_s(count, worker.decode_context),
        num_joining=max(worker.num_requests - count, inflow.num_joining),
        context_each=worker.decode_context / count if count else own_context,
        own_context=own_context,
        share=worker.prefill_share + model.prefill_s(worker.num_waiting_tokens, worker.prefill_pairs) / SHARE_HORIZON_S,
        tpot_s=work.tpot_s,
    )


def estimate_decode(side: DecodeSide, joins_in_s: float, local_prefill_s: float) -> DecodeEstimate:
    """Those that run are at a random place of their lives; it is not believed that load will shrink."""
    model, running = side.model, side.num_decoding
    ended = running * min(1.0, joins_in_s / side.life_s) if side.life_s > 0 else 0.0
    count = max(running, running - ended + side.num_joining)
    context = count * side.context_each
    alone_s = model.decode_s(count + 1, context + side.own_context)
    after_s = _stretched(alone_s, side.share + local_prefill_s / SHARE_HORIZON_S)
    before_s = _stretched(model.decode_s(count, context), side.share)
    return DecodeEstimate(before_s, after_s, min(after_s, alone_s + beside_s(alone_s, side.tpot_s)))


def blocks_at_end(worker: WorkerLoad, work: Work) -> int:
    """What the request will hold when its last token comes."""
    return math.ceil((work.num_tokens + work.num_outputs) / worker.block_size)


def model_of(worker: WorkerLoad) -> StepModel:
    return worker.step_model or PRIOR


def _unseen_tokens(worker: WorkerLoad, inflow: Inflow, age_s: float) -> float:
    """Sent by others since the report: as always, or as this gateway did if that is more (room that one sees, all see), and one standard
    deviation on top, as of a compound Poisson process."""
    as_always = inflow.tokens_per_s * age_s * inflow.num_others / (inflow.num_others + 1)
    expected = max(as_always, inflow.num_others * worker.num_sent_tokens)
    return expected + math.sqrt(expected * inflow.tokens_each)


def _tokens_behind(worker: WorkerLoad, work: Work, now: float) -> int:
    """Of the worker's queue, what is due later than this request."""
    if not worker.queue or worker.reported_at is None:
        return 0
    slack_s = work.ttft_slack_s + now - worker.reported_at       # as of the report
    return sum(tokens for due_s, tokens in worker.queue if due_s > slack_s)


def _decode_s_soon(worker: WorkerLoad, model: StepModel) -> float:
    """A step of its decodes and of those that are known to come: what a prompt that waits will share its steps with."""
    if not worker.num_decoding:
        return model.base_s
    return model.decode_s(worker.num_requests, worker.decode_context * worker.num_requests / worker.num_decoding)


def _stretched(step_s: float, prefill_share: float) -> float:
    return step_s / (1 - min(prefill_share, MAX_PREFILL_SHARE))
