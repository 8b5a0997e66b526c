"""What would happen to a request on a worker? Pure arithmetic on a WorkerLoad and its step model; seconds count from now.

    prefill    queue ahead (in deadline order) + own uncached tokens, cut into steps that the worker's decodes share  →  time to first token
    join       max(prefill end, transfer)                                                                           →  KV arrival
    decode     a step with one sequence more, stretched by the prompts that this worker computes beside it          →  time per token

The decode load is taken at the join: by then some of today's sequences have ended, and those under way have come. (A router that
looks at today's load only lets prefill fill up, then starves it, and so on: Mooncake, FAST'25, section 7.)
"""

import math
from dataclasses import dataclass

from ...engine.load import SHARE_HORIZON_S
from ...engine.predictor import PRIOR
from ...messages.steps import StepModel, attended_pairs
from .policy import WorkerLoad

MAX_PREFILL_SHARE = 0.95


@dataclass(frozen=True, slots=True)
class Work:
    """What a request needs, before it is known where."""

    num_tokens: int                           # prompt
    num_outputs: float                        # expected
    ttft_slack_s: float                       # until the first token is due; infinite without an objective

    @property
    def mean_context(self) -> float:
        """While it decodes."""
        return self.num_tokens + self.num_outputs / 2


@dataclass(frozen=True, slots=True)
class PrefillEstimate:
    backlog_s: float                          # all that waits at the worker, served before this request or not
    own_s: float                              # what the request adds to it
    ttft_s: float


@dataclass(frozen=True, slots=True)
class DecodeEstimate:
    before_s: float                           # per token, without the request
    tpot_s: float                             # per token, with it


def estimate_prefill(worker: WorkerLoad, work: Work, num_cached: int, now: float) -> PrefillEstimate:
    model = model_of(worker)
    uncached = work.num_tokens - num_cached
    pairs = attended_pairs(num_cached, uncached)
    own_s = model.prefill_s(uncached, pairs)
    waiting = worker.num_waiting_tokens
    ahead = waiting - _tokens_behind(worker, work, now)
    done_s = 0.0 if worker.reported_at is None else now - worker.reported_at
    shared_s = model.decode_s(worker.num_decoding, worker.decode_context)
    room = max(1, worker.max_step_tokens - worker.num_decoding) if worker.max_step_tokens else max(1, ahead + uncached)
    backlog_s = max(0.0, model.prefill_s(waiting, worker.prefill_pairs) + waiting // room * shared_s - done_s)
    ahead_s = backlog_s * ahead / waiting if waiting else 0.0
    interrupted_s = shared_s / 2 if worker.num_decoding and not ahead else 0.0       # on average a step is half done
    return PrefillEstimate(backlog_s, own_s, ahead_s + own_s + interrupted_s + math.ceil(uncached / room) * shared_s)


def estimate_decode(worker: WorkerLoad, work: Work, joins_in_s: float, local_prefill_s: float) -> DecodeEstimate:
    model = model_of(worker)
    count, context = _at_join(worker, work, model, joins_in_s)
    share = worker.prefill_share + model.prefill_s(worker.num_waiting_tokens, worker.prefill_pairs) / SHARE_HORIZON_S
    before_s = _stretched(model.decode_s(count, context), share)
    after_s = _stretched(model.decode_s(count + 1, context + work.mean_context), share + local_prefill_s / SHARE_HORIZON_S)
    return DecodeEstimate(before_s, after_s)


def blocks_at_end(worker: WorkerLoad, work: Work) -> int:
    """What the request will hold when its last token comes."""
    return math.ceil((work.num_tokens + work.num_outputs) / worker.block_size)


def model_of(worker: WorkerLoad) -> StepModel:
    return worker.step_model or PRIOR


def _tokens_behind(worker: WorkerLoad, work: Work, now: float) -> int:
    """Of the worker's queue, what is due later than this request."""
    if not worker.queue or worker.reported_at is None:
        return 0
    slack_s = work.ttft_slack_s + now - worker.reported_at       # as of the report
    return sum(tokens for due_s, tokens in worker.queue if due_s > slack_s)


def _at_join(worker: WorkerLoad, work: Work, model: StepModel, joins_in_s: float) -> tuple[float, float]:
    """(sequences, their context) that decode when the request joins. Those that run are at a random place of their lives."""
    if not worker.num_requests:
        return 0.0, 0.0
    mean_context = worker.decode_context / worker.num_decoding if worker.num_decoding else work.mean_context
    life_s = work.num_outputs * model.decode_s(worker.num_decoding, worker.decode_context)
    ended = worker.num_decoding * min(1.0, joins_in_s / life_s) if life_s > 0 else 0.0
    count = max(worker.num_decoding, worker.num_requests - ended)      # others send too: it is not believed that load will shrink
    return count, count * mean_context


def _stretched(step_s: float, prefill_share: float) -> float:
    return step_s / (1 - min(prefill_share, MAX_PREFILL_SHARE))
