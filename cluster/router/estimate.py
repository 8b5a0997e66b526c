"""What would happen to a request on a worker? Pure arithmetic on a WorkerLoad and its step model; seconds count from now.

    prefill    queue ahead (in deadline order) + own uncached tokens, cut into steps that the worker plans one ahead and its decodes
               share  →  time to first token
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
from ...messages.steps import FIRST_BEND, SECOND_BEND, StepModel, attended_pairs
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


class Steps(Struct, frozen=True):
    """How a worker computes prompts for as long as its decodes do not change."""

    model: StepModel
    most: float                               # prompt tokens in one step
    shared_s: float                           # of a step, whatever prompts are in it
    token_s: float                            # of a prompt token with what it attends to, before the bends
    first_bend: int                           # the model's, in prompt tokens
    second_bend: int

    def one_s(self, tokens: float) -> float:
        """As StepModel.prefill_s has it: asked for some times in each decision."""
        step_s = self.shared_s + self.token_s * tokens
        if tokens > self.first_bend:
            step_s += self.model.past_first_s * (tokens - self.first_bend)
            if tokens > self.second_bend:
                step_s += self.model.past_second_s * (tokens - self.second_bend)
        return step_s

    def all_s(self, tokens: float) -> float:
        """As few steps as hold them."""
        if tokens <= self.most:
            return self.one_s(tokens) if tokens else 0.0
        num_full, rest = divmod(tokens, self.most)
        return num_full * self.one_s(self.most) + (self.one_s(rest) if rest else 0.0)


class PrefillEstimate(Struct, frozen=True):
    backlog_s: float                          # all that waits at the worker, served before this request or not
    own_s: float                              # what the request adds to it
    ttft_s: float
    spare_s: float                            # that it may take longer, for what others may have sent more than always


class DecodeEstimate(Struct, frozen=True):
    before_s: float                           # per token, without the request: what prompts take counted as lately
    after_s: float                            # with it
    tpot_s: float                             # with it, as the worker paces itself: prompts get no more than the promise leaves
    alone_s: float                            # a step of decodes alone, with it


class DecodeSide(Struct, frozen=True):
    """What is known of a request on a decode worker whoever computes its prompt."""

    model: StepModel
    num_decoding: int
    life_s: float                             # of an answer, at today's pace
    num_joining: float                        # sequences on their way
    context_each: float                       # of those that decode then
    own_context: float                        # of the request, while it decodes
    prefill_share: float                      # of the worker's time, lately
    waiting_tokens: int                       # of prompts
    waiting_pairs: int
    tpot_s: float                             # promised


def estimate_prefill(worker: WorkerLoad, work: Work, num_cached: int, now: float, inflow: Inflow = NOTHING) -> PrefillEstimate:
    """Step by step, as the worker plans them: what has come when a step is planned may be in it, and is done when all of the step is."""
    model, waiting, arrives_s = model_of(worker), worker.num_waiting_tokens, worker.message_s
    uncached = work.num_tokens - num_cached
    pairs = attended_pairs(num_cached, uncached)
    age_s = 0.0 if worker.reported_at is None else now - worker.reported_at + arrives_s
    unseen, unseen_at_most = _unseen_tokens(worker, inflow, age_s)
    sent = worker.num_sent_tokens + unseen
    ahead: float = waiting - worker.num_sent_tokens - _tokens_behind(worker, work, now)
    steps = _steps(worker, model, work, (pairs + worker.prefill_pairs) / (uncached + waiting), ahead + sent + uncached)
    begins_s, closes_s, is_shared = worker.busy_s - age_s, worker.plans_in_s - age_s, worker.num_decoding > 0
    backlog_s = max(0.0, begins_s + steps.all_s(waiting)) + model.full_token_s * unseen_at_most
    while closes_s <= arrives_s and ahead:                       # steps that are planned before the request comes
        first = min(ahead, steps.most)
        closes_s, begins_s, ahead = begins_s, begins_s + steps.one_s(first), ahead - first
    if closes_s <= arrives_s and is_shared and steps.shared_s > 0:                           # then decodes alone go on
        closes_s, begins_s = begins_s, begins_s + steps.shared_s
        if closes_s <= arrives_s:
            closes_s = arrives_s + (closes_s - arrives_s) % steps.shared_s
            begins_s = closes_s + steps.shared_s
    if sent and closes_s <= arrives_s and not (ahead or is_shared):                          # it was planned when it came
        first = min(sent, steps.most)
        closes_s = max(begins_s, 0.0 if worker.sent_at is None else worker.sent_at - now + arrives_s)
        begins_s, sent = closes_s + steps.one_s(first), sent - first
    last, soonest_s = ahead + sent + uncached, 0.0
    if last > steps.most:
        num_before, full_s = math.ceil(last / steps.most) - 1, steps.one_s(steps.most)
        last -= num_before * steps.most
        closes_s, begins_s = begins_s + (num_before - 1) * full_s, begins_s + num_before * full_s
        soonest_s = arrives_s + steps.all_s(uncached)
    if closes_s > arrives_s:
        last += min(steps.most - last, inflow.tokens_per_s * (closes_s - arrives_s))
    ends_s = max(begins_s, arrives_s) + steps.one_s(last)
    ttft_s, spare_s = max(ends_s, soonest_s) + worker.message_s, steps.all_s(unseen_at_most - unseen)
    return PrefillEstimate(backlog_s, steps.one_s(uncached) - steps.shared_s, ttft_s, spare_s)


def decode_side(worker: WorkerLoad, work: Work, inflow: Inflow = NOTHING) -> DecodeSide:
    model, count = model_of(worker), worker.num_decoding
    own_context = work.num_tokens + work.num_outputs / 2
    return DecodeSide(
        model=model,
        num_decoding=count,
        life_s=work.num_outputs * model.decode_s(count, worker.decode_context),
        num_joining=max(worker.num_requests - worker.num_passing - count, inflow.num_joining),
        context_each=worker.decode_context / count if count else own_context,
        own_context=own_context,
        prefill_share=worker.prefill_share,
        waiting_tokens=worker.num_waiting_tokens,
        waiting_pairs=worker.prefill_pairs,
        tpot_s=work.tpot_s,
    )


def estimate_decode(side: DecodeSide, joins_in_s: float, local_prefill_s: float) -> DecodeEstimate:
    """Those that run are at a random place of their lives; it is not believed that load will shrink."""
    model, running = side.model, side.num_decoding
    ended = running * joins_in_s / side.life_s if joins_in_s < side.life_s else running
    count = running + max(0.0, side.num_joining - ended)
    context, share = count * side.context_each, side.prefill_share
    if side.waiting_tokens:
        share += model.prefill_s(side.waiting_tokens, side.waiting_pairs, count) / SHARE_HORIZON_S
    before_s, alone_s = model.decode_s(count, context), model.decode_s(count + 1, context + side.own_context)
    after_s = alone_s / (1 - min(share + local_prefill_s / SHARE_HORIZON_S, MAX_PREFILL_SHARE))
    paced_s = min(after_s, alone_s + beside_s(alone_s, side.tpot_s))
    return DecodeEstimate(before_s / (1 - min(share, MAX_PREFILL_SHARE)), after_s, paced_s, alone_s)


def _steps(worker: WorkerLoad, model: StepModel, work: Work, pairs_each: float, num_tokens: float) -> Steps:
    most = worker.max_step_tokens - worker.num_decoding if worker.max_step_tokens else num_tokens
    token_s = model.prefill_token_s + model.prefill_pair_s * pairs_each
    if not worker.num_decoding:
        return Steps(model, most if most > 1 else 1.0, model.base_s, token_s, FIRST_BEND, SECOND_BEND)
    count = worker.num_requests - worker.num_passing               # of those that decode and those that are known to come
    shared_s = model.decode_s(count, worker.decode_context * count / worker.num_decoding)
    most = max(1.0, min(most, model.tokens_within(beside_s(shared_s, work.tpot_s), pairs_each, count)))
    return Steps(model, most, shared_s, token_s, max(0, FIRST_BEND - count), max(0, SECOND_BEND - count))


def blocks_at_end(worker: WorkerLoad, work: Work) -> int:
    """What the request will hold when its last token comes."""
    return math.ceil((work.num_tokens + work.num_outputs) / worker.block_size)


def model_of(worker: WorkerLoad) -> StepModel:
    return worker.step_model or PRIOR


def _unseen_tokens(worker: WorkerLoad, inflow: Inflow, age_s: float) -> tuple[float, float]:
    """Sent by others since the report: as always; and at most: as this gateway did if that is more (room that one sees, all see), and one
    standard deviation on top, as of a compound Poisson process."""
    if not inflow.num_others:
        return 0.0, 0.0
    as_always = inflow.tokens_per_s * age_s * inflow.num_others / (inflow.num_others + 1)
    much = max(as_always, inflow.num_others * worker.num_sent_tokens)
    return as_always, much + math.sqrt(much * inflow.tokens_each)


def _tokens_behind(worker: WorkerLoad, work: Work, now: float) -> int:
    """Of the worker's queue, what is due later than this request."""
    if not worker.queue or worker.reported_at is None:
        return 0
    slack_s = work.ttft_slack_s + now - worker.reported_at       # as of the report
    return sum(tokens for due_s, tokens in worker.queue if due_s > slack_s)
