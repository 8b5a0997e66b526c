"""What would happen to a request on a worker? Pure arithmetic on a WorkerLoad and its step model; seconds count from now.

    prefill    queue ahead (in deadline order) + own uncached tokens, cut into steps that the worker plans one ahead and its decodes
               share  →  time to first token
    join       max(prefill end, transfer)                                                                           →  KV arrival
    decode     a step with one sequence more, stretched by the prompts that its pace allows beside it               →  time per token

The decode load is taken at the join: by then some of today's sequences have ended, and those under way have come. (A router that
looks at today's load only lets prefill fill up, then starves it, and so on: Mooncake, FAST'25, section 7.)

What is counted is a float here from the first: of an int and a float, Python makes a sum in more than twice the time.
"""

import math

from msgspec import Struct

from ...engine.load import SHARE_HORIZON_S
from ...engine.pace import MIN_SHARE, beside_s, enough_rows
from ...messages.steps import FIRST_BEND, NO_TIME_S, SECOND_BEND, StepModel, attended_pairs
from .policy import WorkerLoad

MAX_PREFILL_SHARE = 0.95
FIRST_OUTPUTS_GUESS = 128.0                   # tokens, until an answer has ended

MOST_LED = 8
"""Steps, with nobody's prompt before the request's done, for which what decodes lend is followed."""

ROUNDING = 1e-9
"""Of how many prompts or steps are still whole, and of a second."""


class Work(Struct, frozen=True, gc=False):
    """What a request needs, before it is known where."""

    num_tokens: int                           # prompt
    num_outputs: float                        # expected: no more than it asks for
    ttft_slack_s: float                       # until the first token is due; infinite without an objective
    tpot_s: float = math.inf                  # promised
    waited_s: float = 0.0                     # at its gateway
    fills_in: bool = False                    # batch work: it meets other batch work, too
    left_free_s: float = math.inf             # a token's time that others are to find possible where this request decodes
    mean_outputs: float = FIRST_OUTPUTS_GUESS # of all answers of its class
    due_s: float | None = None                # in queues; None: when its first token is


class Inflow(Struct, frozen=True, gc=False):
    """What all gateways send to one worker of a pool: guessed from what this one sends, for they are alike."""

    tokens_per_s: float = 0.0                 # prompt tokens
    tokens_each: float = 0.0                  # of a prompt: mean of squares by mean
    num_others: float = 0.0                   # gateways, of whose share a report must come to show it
    num_joining: float = 0.0                  # sequences on their way to a decode worker


NOTHING = Inflow()


class Steps(Struct, frozen=True, gc=False):
    """How a worker computes prompts for as long as its decodes do not change."""

    shared_s: float                           # of a step, whatever prompts are in it
    beside_s: float                           # of a step, for prompts, in the long run; infinite without decodes
    least_s: float                            # that they get though decodes are behind their pace
    count: float                              # decodes
    budget: float                             # prompt tokens, whatever they take
    enough: float                             # in a step in which a prompt ends
    token_s: float                            # of a prompt token with what it attends to, before the bends
    past_first_s: float                       # the model's
    past_second_s: float
    first_bend: float                         # the model's, in prompt tokens
    second_bend: float

    def one_s(self, tokens: float) -> float:
        """As StepModel.prefill_s has it: asked for some times in each decision."""
        step_s = self.shared_s + self.token_s * tokens
        if tokens > self.second_bend:
            return step_s + self.past_first_s * (tokens - self.first_bend) + self.past_second_s * (tokens - self.second_bend)
        return step_s + self.past_first_s * (tokens - self.first_bend) if tokens > self.first_bend else step_s

    def all_s(self, tokens: float, most: float) -> float:
        """As few steps as hold them, of `most` each."""
        if tokens <= most:
            return self.one_s(tokens) if tokens else 0.0
        num_full, rest = divmod(tokens, most)
        return num_full * self.one_s(most) + (self.one_s(rest) if rest else 0.0)

    def room(self, lead_s: float = 0.0) -> float:
        """Prompt tokens in a step whose decodes are so far ahead of their pace, or behind it. `one_s` is the highest of three lines: the
        first of them to come to the time for prompts tells."""
        if not self.count:
            return self.budget
        seconds = self.beside_s + lead_s
        if seconds < self.least_s:
            seconds = self.least_s
        first_s, hidden_s = self.token_s or NO_TIME_S, self.past_first_s * self.first_bend
        tokens, second_s, all_hidden_s = seconds / first_s, first_s + self.past_first_s, hidden_s + self.past_second_s * self.second_bend
        after_first, after_second = (seconds + hidden_s) / second_s, (seconds + all_hidden_s) / (second_s + self.past_second_s)
        if after_first < tokens:
            tokens = after_first
        if after_second < tokens:
            tokens = after_second
        return self.budget if tokens > self.budget else tokens if tokens > 1.0 else 1.0

    def ending(self, tokens: float, most: float) -> float:
        """Prompt tokens in a step in which a prompt ends that has so many left, of at most `most`."""
        enough = self.enough if self.enough > tokens else tokens
        return most if most < enough else enough

    def lead_after(self, lead_s: float, tokens: float) -> float:
        """Of the next step's decodes. If there was room for more tokens, a prompt has ended and decodes, with nothing to lend."""
        left_s = lead_s + self.beside_s - (self.one_s(tokens) - self.shared_s)
        return left_s if left_s < -ROUNDING or (left_s > 0.0 and tokens >= self.budget) else 0.0


class PrefillEstimate(Struct, frozen=True, gc=False):
    backlog_s: float                          # all that waits at the worker, served before this request or not
    own_s: float                              # what the request adds to it
    ttft_s: float
    spare_s: float                            # that it may take longer, for what others may have sent more than always


class DecodeEstimate(Struct, frozen=True, gc=False):
    before_s: float                           # per token, without the request: what prompts take counted as lately
    after_s: float                            # with it
    tpot_s: float                             # with it, as the worker paces itself: prompts get no more than the promise leaves
    alone_s: float                            # per token, with it, if there were no prompts


class DecodeSide(Struct, frozen=True, gc=False):
    """What is known of a request on a decode worker whoever computes its prompt."""

    model: StepModel
    num_decoding: float
    life_s: float                             # of an answer, at today's pace
    num_joining: float                        # sequences on their way
    context_each: float                       # of those that decode then
    own_context: float                        # of the request, while it decodes
    prefill_share: float                      # of the worker's time, lately
    waiting_tokens: int                       # of prompts
    waiting_pairs: int
    tpot_s: float                             # promised
    turns: float                              # steps a token takes: of batch work that gives way, one sequence goes on in each
    waits: float                              # steps until the first one that may hold what was handed over
    place_s: float                            # until the worker's steps have a place for it, at the mean
    place_spread_s: float                     # standard deviation of that


def estimate_prefill(worker: WorkerLoad, work: Work, num_cached: int, now: float, inflow: Inflow = NOTHING) -> PrefillEstimate:
    """Step by step, as the worker plans them: what has come when a step is planned may be in it, and is done when all of the step is."""
    model, waiting, arrives_s = worker.step_model, float(worker.num_waiting_tokens), worker.message_s
    own = float(work.num_tokens - num_cached)
    age_s = 0.0 if worker.reported_at is None else now - worker.reported_at + arrives_s
    unseen, unseen_at_most = _unseen_tokens(worker, inflow, age_s)
    sent = worker.num_sent_tokens + unseen
    ahead, num_ahead = waiting - worker.num_sent_tokens, 1
    if worker.queue and worker.reported_at is not None:
        ahead, num_ahead = _ahead(worker, ahead, _due_s(work) + now - worker.reported_at)
    pairs_each = (attended_pairs(num_cached, work.num_tokens - num_cached) + worker.prefill_pairs) / (own + waiting)
    steps = steps_of(worker, work, pairs_each, ahead + sent + own)
    most = steps.room()
    closes_s, begins_s = worker.plans_in_s - age_s, worker.busy_s - age_s
    own_s, backlog_s, spare_s = steps.one_s(own) - steps.shared_s, begins_s, 0.0
    if waiting:
        backlog_s += steps.all_s(waiting, most)
    if backlog_s < 0.0:
        backlog_s = 0.0
    if unseen_at_most:
        backlog_s += model.full_token_s * unseen_at_most
        spare_s = steps.all_s(unseen_at_most - unseen, most)

    prompt = ahead / num_ahead if ahead else sent                # tokens of each of those ahead
    each = room = most                                           # tokens in a step: of those ahead, and in the request's last one
    if num_ahead > 1 and not steps.count:
        each = steps.ending(prompt, most)
    lead_s = worker.lead_s if steps.count else 0.0
    if lead_s > 0.0 and worker.num_expected:
        lead_s = 0.0                                             # who joins has nothing to lend
    if closes_s <= arrives_s:
        sent_s = 0.0 if worker.sent_at is None else worker.sent_at - now + arrives_s
        closes_s, begins_s, lead_s, ahead, sent = _until_it_comes(
            steps, closes_s, begins_s, lead_s, ahead, sent, each, prompt, arrives_s, sent_s
        )
    if begins_s < arrives_s:
        begins_s = arrives_s
    before, last, led = ahead + sent, own, 0.0
    if lead_s < 0.0:
        closes_s, begins_s, before, last, led = _while_behind(steps, closes_s, begins_s, lead_s, before, own)
    elif lead_s:
        joins_at = -1.0                                          # nobody's prompt is before it
        if before:
            joins_at = sent + (math.ceil(ahead / prompt - ROUNDING) - 1) * prompt if ahead else 0.0
        closes_s, begins_s, before, last, led = _while_led(steps, closes_s, begins_s, lead_s, before, own, joins_at)
    if led:
        last, room = before + last, led
    elif before or last > room:
        closes_s, begins_s, last = _in_the_long_run(steps, closes_s, begins_s, before, last, each, most)
    if closes_s > arrives_s and last < steps.enough:             # prompts that come later share the last step
        free, later = (steps.enough if steps.enough < room else room) - last, inflow.tokens_per_s * (closes_s - arrives_s)
        last += later if later < free else free
    return PrefillEstimate(backlog_s, own_s, begins_s + steps.one_s(last) + arrives_s, spare_s)


# What follows goes from a plan's (closes_s, begins_s, …) to a later one's. A step is planned when the one before it begins: at `closes_s`,
# after which nothing goes into it, the next one is, and begins at `begins_s`. `before`: tokens that come before the request's `own`.


def _until_it_comes(
    steps: Steps, closes_s: float, begins_s: float, lead_s: float, ahead: float, sent: float, each: float, prompt: float,
    arrives_s: float, sent_s: float,
) -> tuple[float, float, float, float, float]:  # fmt: skip
    """The steps that are planned before the request is there; `sent_s`: when the first of what is on its way comes."""
    joins_at = ahead - prompt                                    # so much is left when the first of those ahead has ended
    while closes_s <= arrives_s and ahead:
        first = each
        if lead_s:
            first = steps.room(lead_s)
            lead_s = steps.lead_after(lead_s, ahead if ahead < first else first)
        if ahead < first:
            first = ahead
        closes_s, begins_s, ahead = begins_s, begins_s + steps.one_s(first), ahead - first
        if ahead <= joins_at and lead_s > 0.0:
            lead_s = 0.0
    if closes_s <= arrives_s and steps.count and steps.shared_s > 0.0:                         # then decodes alone go on
        num_more = math.ceil((arrives_s - begins_s) / steps.shared_s) if begins_s < arrives_s else 0
        closes_s = begins_s + num_more * steps.shared_s
        begins_s, lead_s = closes_s + steps.shared_s, lead_s + (1 + num_more) * steps.beside_s
    elif closes_s <= arrives_s and sent and not (ahead or steps.count):                      # it is planned when it comes
        first, closes_s = sent if sent < each else each, begins_s if begins_s > sent_s else sent_s
        begins_s, sent = closes_s + steps.one_s(first), sent - first
    return closes_s, begins_s, lead_s, ahead, sent


def _while_behind(
    steps: Steps, closes_s: float, begins_s: float, lead_s: float, before: float, own: float
) -> tuple[float, float, float, float, float]:
    """The steps in which decodes catch up: prompts get their least share alone, and in the last of them what is left → as `_while_led`."""
    gain_s = steps.beside_s - steps.least_s
    if gain_s <= 0.0:                                            # in the long run it is the least share, too
        return closes_s, begins_s, before, own, 0.0
    room = steps.room(-gain_s)
    each_s, count = steps.one_s(room), math.ceil(-lead_s / gain_s - 1.0 - ROUNDING)
    needed = math.ceil((before + own) / room - ROUNDING) - 1     # before the one in which the request ends, were there no more room
    is_enough = needed < count
    if is_enough:
        count = needed
    if count > 0:
        closes_s, begins_s, done = begins_s + (count - 1) * each_s, begins_s + count * each_s, count * room
        before, own = (before - done, own) if before > done else (0.0, own - (done - before))
        lead_s += count * gain_s
    if not is_enough:
        room = steps.room(lead_s)
    if before + own <= room:
        return closes_s, begins_s, before, own, room
    closes_s, begins_s = begins_s, begins_s + steps.one_s(room)
    before, own = (before - room, own) if before > room else (0.0, own - (room - before))
    return closes_s, begins_s, before, own, 0.0


def _while_led(
    steps: Steps, closes_s: float, begins_s: float, lead_s: float, before: float, own: float, joins_at: float
) -> tuple[float, float, float, float, float]:
    """The steps with room that decodes lend, until `joins_at` is left before the request, when a prompt has ended and decodes → last, the
    room of the one in which the request ends, if it is one of them, else 0."""
    for _ in range(MOST_LED):
        room = steps.room(lead_s)
        if 0.0 < before < room:                                  # a prompt ends in it
            room = steps.ending(before, room)
        if before + own <= room:
            return closes_s, begins_s, before, own, room
        closes_s, begins_s = begins_s, begins_s + steps.one_s(room)
        lead_s = steps.lead_after(lead_s, room)
        if before > room:
            before -= room
        else:
            before, own = 0.0, own - (room - before)
        if not lead_s or before <= joins_at:
            break
    return closes_s, begins_s, before, own, 0.0


def _in_the_long_run(
    steps: Steps, closes_s: float, begins_s: float, before: float, own: float, each: float, most: float
) -> tuple[float, float, float]:
    """The steps before the last, as full as they may be → when that is planned, when it begins, and its tokens."""
    room = most
    if before:
        num_full, rest = divmod(before, each)
        if num_full:
            each_s = steps.one_s(each)
            closes_s, begins_s = begins_s + (num_full - 1.0) * each_s, begins_s + num_full * each_s
        if rest:                                                 # a prompt ends in the next one
            own, room = rest + own, steps.ending(rest, most)
    if own > room and room < most:
        closes_s, begins_s, own = begins_s, begins_s + steps.one_s(room), own - room
    if own > most:
        num_full, most_s = math.ceil(own / most) - 1, steps.one_s(most)
        closes_s, begins_s, own = begins_s + (num_full - 1) * most_s, begins_s + num_full * most_s, own - num_full * most
    return closes_s, begins_s, own


def decode_side(worker: WorkerLoad, work: Work, inflow: Inflow = NOTHING) -> DecodeSide:
    model, (count, context, most) = worker.step_model, _met(worker, work)
    own_context = work.num_tokens + work.num_outputs / 2
    known, life_s = most - count, work.mean_outputs * model.decode_s(count, context)
    place_s, place_spread_s = _place(worker, work, most, life_s) if worker.max_sequences and most >= worker.max_sequences else (0.0, 0.0)
    return DecodeSide(
        model=model,
        num_decoding=count,
        life_s=life_s,
        num_joining=known if known > inflow.num_joining else inflow.num_joining,
        context_each=context / count if count else own_context,
        own_context=own_context,
        prefill_share=worker.prefill_share,
        waiting_tokens=worker.num_waiting_tokens,
        waiting_pairs=worker.prefill_pairs,
        tpot_s=work.tpot_s,
        turns=worker.filling.num_decoding + 1.0 if work.fills_in and worker.num_decoding else 1.0,
        waits=_waits(worker) if count else 0.0,
        place_s=place_s,
        place_spread_s=place_spread_s,
    )


def _place(worker: WorkerLoad, work: Work, most: float, life_s: float) -> tuple[float, float]:
    """Of a worker whose places are taken: until one is the request's, and the standard deviation, as of events of a Poisson process. Those
    that wait and are due later come later (of a long queue, as many as it has groups)."""
    num_before = most + 1.0 - worker.max_sequences - sum([due_s > _due_s(work) for due_s, _ in worker.queue])
    if num_before < 1.0:
        num_before = 1.0
    each_s = life_s / (1.0 - min(worker.prefill_share, MAX_PREFILL_SHARE)) / worker.max_sequences
    return num_before * each_s, math.sqrt(num_before) * each_s


def _due_s(work: Work) -> float:
    return work.ttft_slack_s if work.due_s is None else work.due_s


def _waits(worker: WorkerLoad) -> float:
    """Half of the step under way, on average, and the one that is planned behind it, if the worker plans ahead."""
    return 1.5 if worker.busy_s > worker.plans_in_s else 0.5


def _met(worker: WorkerLoad, work: Work) -> tuple[float, float, float]:
    """Decodes that are there, what they attend to, and how many they are with all that are known to come: without batch work, which gives
    way to them; for batch work, with it."""
    most = float(worker.num_requests - worker.num_passing)
    if not worker.num_filling:
        return float(worker.num_decoding), worker.decode_context, most
    if not work.fills_in:
        return float(worker.num_decoding), worker.decode_context, most - worker.num_filling
    filling = worker.filling
    return float(worker.num_decoding + filling.num_decoding), worker.decode_context + filling.decode_context, most


def estimate_decode(side: DecodeSide, joins_in_s: float, local_prefill_s: float) -> DecodeEstimate:
    """Those that run are at a random place of their lives; it is not believed that load will shrink."""
    model, running, share = side.model, side.num_decoding, side.prefill_share
    ended = running * joins_in_s / side.life_s if joins_in_s < side.life_s else running
    count = running + (side.num_joining - ended if side.num_joining > ended else 0.0)
    context = count * side.context_each
    if side.waiting_tokens:
        share += model.prefill_s(side.waiting_tokens, side.waiting_pairs, count) / SHARE_HORIZON_S
    before_s, alone_s = model.decode_s(count, context), side.turns * model.decode_s(count + 1.0, context + side.own_context)
    with_it = share + local_prefill_s / SHARE_HORIZON_S
    after_s = alone_s / (1.0 - (with_it if with_it < MAX_PREFILL_SHARE else MAX_PREFILL_SHARE))
    paced_s = alone_s + beside_s(alone_s, side.tpot_s)
    before_s /= 1.0 - (share if share < MAX_PREFILL_SHARE else MAX_PREFILL_SHARE)
    return DecodeEstimate(before_s, after_s, paced_s if paced_s < after_s else after_s, alone_s)


def steps_of(worker: WorkerLoad, work: Work, pairs_each: float, num_tokens: float) -> Steps:
    """`pairs_each`: what a prompt token attends to. `num_tokens`: of all prompts, the most that a step can hold if no budget was told."""
    model = worker.step_model
    num_decoding, context, most = _met(worker, work)
    count, shared_s, room_s = 0.0, model.base_s, math.inf
    if num_decoding:
        count = (num_decoding + most) / 2.0                      # those that are known to come do so on the way
        shared_s = model.decode_s(count, context * count / num_decoding)
        room_s = beside_s(shared_s, work.tpot_s)
    budget = worker.max_step_tokens - num_decoding if worker.max_step_tokens else num_tokens
    return Steps(
        shared_s=shared_s,
        beside_s=room_s,
        least_s=shared_s / MIN_SHARE,
        count=count,
        budget=budget if budget > 1.0 else 1.0,
        enough=enough_rows(model, shared_s) - count,
        token_s=model.prefill_token_s + model.prefill_pair_s * pairs_each,
        past_first_s=model.past_first_s,
        past_second_s=model.past_second_s,
        first_bend=FIRST_BEND - count if count < FIRST_BEND else 0.0,
        second_bend=SECOND_BEND - count if count < SECOND_BEND else 0.0,
    )


def blocks_at_end(worker: WorkerLoad, work: Work) -> int:
    """What the request will hold when its last token comes."""
    return math.ceil((work.num_tokens + work.num_outputs) / worker.block_size)


def _unseen_tokens(worker: WorkerLoad, inflow: Inflow, age_s: float) -> tuple[float, float]:
    """Sent by others since the report: as always; and at most: as this gateway did if that is more (room that one sees, all see), and one
    standard deviation on top, as of a compound Poisson process."""
    if not inflow.num_others:
        return 0.0, 0.0
    as_always = inflow.tokens_per_s * age_s * inflow.num_others / (inflow.num_others + 1.0)
    as_this_one = inflow.num_others * worker.num_sent_tokens
    much = as_this_one if as_this_one > as_always else as_always
    return as_always, much + math.sqrt(much * inflow.tokens_each)


def _ahead(worker: WorkerLoad, ahead: float, slack_s: float) -> tuple[float, int]:
    """Of the worker's queue, what is due no later than this request, whose slack is as of the report: tokens, and of how many prompts, with
    one that is under way (of a long queue, of how many groups: queue_by_slack)."""
    under_way, num_ahead = ahead, 0
    for due_s, tokens in worker.queue:
        under_way -= tokens
        if due_s > slack_s:
            ahead -= tokens
        else:
            num_ahead += 1
    return ahead, num_ahead + (under_way > 0)
