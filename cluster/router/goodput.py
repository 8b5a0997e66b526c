"""Sends a request where both its promises are predicted to be kept, at the least cost to the cluster.

    every (P, D) pair and every local path of a sample of the pools; if none keeps both promises, a P by itself
        │ estimate.py: TTFT, KV arrival, TPOT, memory
        ▼
    some keep both promises ──► Route: of those, the one that uses least capacity
    none, but TTFT could still be kept ──► Queue: somebody may end within PATIENCE_S
    nobody did, or none can keep TTFT ──► Refuse, with the time until one could; or, if it may be late, Route: the least late

*Capacity used* is the rise of a potential: each resource touched (a prefill queue against TTFT, a decode step against TPOT, KV memory)
is priced STEEPNESS**load, so a worker near its limit is dear and an idle one nearly free; one that is two GPUs costs twice as much at the
same load. (Exponential prices on loads are what makes online assignment competitive: Aspnes, Azar, Fiat, Plotkin, Waarts, "On-line routing
of virtual circuits with applications to load balancing and machine scheduling", JACM 1997.)

Batch work counts for itself alone: workers have it give way to all others. What priority requests are promised a token is left free by
default ones, for as long as there are some: who is promised less would otherwise fill steps until nobody who is promised more finds room.

Of a pool larger than ALL_UP_TO, two workers are drawn for each request, and one that holds the longest prefix of the prompt is added if
neither does: gateways that share a stale view do not all run to the same worker.
"""

import math
import random
from collections import deque
from collections.abc import Sequence

from msgspec import Struct, structs

from ...engine.pace import AIM, beside_s
from ...engine.urgency import NO_OBJECTIVE_S, due_in_s
from ...messages.requests import Route, ServiceClass, WorkerRef
from .estimate import (
    FIRST_OUTPUTS_GUESS,
    NOTHING,
    DecodeSide,
    Inflow,
    PrefillEstimate,
    Work,
    blocks_at_end,
    decode_side,
    estimate_decode,
    estimate_prefill,
)
from .flow import Flow
from .policy import (
    ClusterView,
    Decision,
    Explanation,
    Path,
    Prediction,
    Queue,
    Refuse,
    RoutingRequest,
    WorkerLoad,
    prefill_pool,
    what_is_missing,
)
from .prefix_aware import Held, PrefixIndex, chain

ALL_UP_TO = 4
STEEPNESS = 50.0
PATIENCE_S = 0.04                             # so long a request waits at its gateway for room: longer ones come to the workers in a hurry
MAX_LOAD = 4.0                                # loads beyond are equally hopeless
PRIORITY_MEMORY_S = 30.0                      # for so long what a priority request was promised a token is kept free for the next one
NO_TTFT_SCALE_S = 1.0                         # what queues are measured against without an objective
NO_TPOT_SCALE_S = 0.05
MIN_RETRY_AFTER_S = 0.1
FULL_RETRY_AFTER_S = 1.0
CLOCK_TICK_S = 1e-6                           # what is nearer than that is now


class GoodputOptions(Struct, frozen=True):
    local_only: bool = False
    max_requests_per_worker: int = 1024
    serves_late: bool = False                 # what cannot keep its promises is served as well as it can be, not refused
    seed: int = 0


class Goodput:
    def __init__(self, options: GoodputOptions, index: PrefixIndex | None = None) -> None:
        self._options = options
        self._index = index or PrefixIndex()
        self._random = random.Random(options.seed)
        self._flows = {"prefill": Flow(), "decode": Flow()}      # prompt tokens sent to be computed in each pool
        self._priority: deque[tuple[float, float]] = deque()     # (TPOT promised, remembered until): the tightest first, each ends sooner

    def choose(self, request: RoutingRequest, view: ClusterView, now: float) -> Decision:
        return self.decide(request, view, now).decision

    def decide(self, request: RoutingRequest, view: ClusterView, now: float) -> Explanation:
        hashes = _hashes(request, view)
        if request.service_class is ServiceClass.PRIORITY:
            self._remember_priority(request, view, now)
        explanation, stays = self._explain(request, view, now, hashes)
        decision = explanation.decision
        if isinstance(decision, Route):
            computes = "prefill" if stays or decision.prefill is not None or request.path is Path.ALONE else "decode"
            self._flows[computes].add(len(request.token_ids), now)
            self._index.insert(hashes, *([decision.decode] if decision.prefill is None else [decision.prefill, decision.decode]))
        return explanation

    def explain(self, request: RoutingRequest, view: ClusterView, now: float) -> Explanation:
        """What `choose` would say and why (on another sample of the pools); nothing is remembered."""
        return self._explain(request, view, now, _hashes(request, view))[0]

    def _remember_priority(self, request: RoutingRequest, view: ClusterView, now: float) -> None:
        """Unless nobody could keep it."""
        tpot_s = request.objectives.tpot_s
        if tpot_s is None or not any(_keeps_alone(worker, tpot_s) for worker in (*view.decode, *view.prefill)):
            return
        while self._priority and self._priority[-1][0] >= tpot_s:
            self._priority.pop()
        self._priority.append((tpot_s, now + PRIORITY_MEMORY_S))

    def _left_free_s(self, now: float) -> float:
        """For priority requests, of a token's time."""
        while self._priority and now >= self._priority[0][1]:
            self._priority.popleft()
        return self._priority[0][0] if self._priority else math.inf

    def _explain(
        self, request: RoutingRequest, view: ClusterView, now: float, hashes: Sequence[int]
    ) -> tuple[Explanation, bool]:
        """And whether a prefill worker is to decode the answer, too."""
        work = _work(request, view, now)
        if self._priority and request.service_class is ServiceClass.DEFAULT:
            work = structs.replace(work, left_free_s=self._left_free_s(now))
        if (missing := what_is_missing(request, view)) is not None:
            return Explanation(Queue(missing), (), work.num_outputs, work.ttft_slack_s), False
        predictions, stays = self._predictions(request, work, view, now, hashes)
        decision = self._decide(request, work, predictions, view)
        return Explanation(decision, tuple(predictions), work.num_outputs, work.ttft_slack_s), stays

    def _predictions(
        self, request: RoutingRequest, work: Work, view: ClusterView, now: float, hashes: Sequence[int]
    ) -> tuple[list[Prediction], bool]:
        prefill = prefill_pool(request, view, self._options.local_only)
        held, chunk_tokens = self._index.held(hashes), _chunk_tokens(view)

        def prefilled(worker: WorkerLoad, inflow: Inflow) -> _Source:
            num_known = held.depth(worker.ref) * chunk_tokens if held.most else 0
            num_cached = _num_cached(worker, num_known, work) if num_known else 0
            return _source(request, work, worker, estimate_prefill(worker, work, num_cached, now, inflow))

        there, here = self._inflow("prefill", prefill, view, now), self._inflow("decode", view.decode, view, now)
        sampled = self._sample(request, prefill, held)
        senders = [prefilled(worker, there) for worker in sampled]
        predictions, must_split = [], request.path is Path.SPLIT
        for decode in self._sample(request, view.decode, held):
            target = _target(request, work, decode, here)
            if not must_split:
                own = prefilled(decode, here)
                predictions.append(_predict(target, own, own.ttft_s))
            for source in senders:
                moved_s = view.links.get((source.ref, decode.ref), 0.0) * work.num_tokens
                predictions.append(_predict(target, source, moved_s if moved_s > source.ttft_s else source.ttft_s))
        predictions.sort(key=_rank)
        if not _may_stay(request) or (predictions and predictions[0].keeps_both):
            return predictions, False
        targets = [_target(request, work, _beside_its_prompts(worker), NOTHING) for worker in sampled]
        alone = [_predict(target, own, own.ttft_s) for target, own in zip(targets, senders, strict=True)]
        staying = sorted([each for each in alone if each.keeps_both], key=_rank)
        return staying + predictions, bool(staying)

    def _inflow(self, pool_name: str, pool: Sequence[WorkerLoad], view: ClusterView, now: float) -> Inflow:
        if not pool:
            return NOTHING
        gateways_per_worker, flow = view.num_gateways / len(pool), self._flows[pool_name]
        return Inflow(
            tokens_per_s=flow.per_s(now) * gateways_per_worker,
            tokens_each=flow.tokens_each,
            num_others=view.num_gateways - 1.0,
            num_joining=sum([worker.num_expected for worker in pool]) * gateways_per_worker if pool_name == "decode" else 0.0,
        )

    def _sample(self, request: RoutingRequest, pool: Sequence[WorkerLoad], held: Held) -> list[WorkerLoad]:
        """Of those that take more, two drawn at random and, if neither holds as much of the prompt as any, one that does. Nobody else is
        looked at where that is not needed: of a large pool, looking takes as long as one of the predictions."""
        limit = self._options.max_requests_per_worker
        drawn = self._two(pool) if len(pool) > ALL_UP_TO and not request.avoid else []
        if not drawn or drawn[0].num_requests >= limit or drawn[1].num_requests >= limit:
            usable = self._usable(request, pool)
            if len(usable) <= ALL_UP_TO:
                return usable
            drawn = self._two(usable)
        if not held.most:
            return drawn
        holder = held.deepest([*drawn, *(self._usable(request, pool) if request.avoid else pool)], limit)
        return drawn if holder is None or holder in drawn else [*drawn, holder]

    def _usable(self, request: RoutingRequest, pool: Sequence[WorkerLoad]) -> list[WorkerLoad]:
        """Those that take more, without those to be avoided if there are others."""
        below = [worker for worker in pool if worker.num_requests < self._options.max_requests_per_worker]
        return [worker for worker in below if worker.ref not in request.avoid] or below if request.avoid else below

    def _two(self, workers: Sequence[WorkerLoad]) -> list[WorkerLoad]:
        """At random; `random.sample` takes more than three times as long."""
        one, other = int(self._random.random() * len(workers)), int(self._random.random() * (len(workers) - 1))
        return [workers[one], workers[other + (other >= one)]]

    def _decide(self, request: RoutingRequest, work: Work, predictions: list[Prediction], view: ClusterView) -> Decision:
        if not predictions:
            return Refuse(f"every worker has {self._options.max_requests_per_worker} requests or more", FULL_RETRY_AFTER_S)
        if predictions[0].keeps_both:
            return predictions[0].route
        if request.may_be_late or self._options.serves_late or (request.objectives.ttft_s is None and request.objectives.tpot_s is None):
            return min(predictions, key=lambda each: _lateness(request, work, each)).route
        soonest = min(predictions, key=lambda each: each.ttft_s)
        if not any(each.keeps_ttft for each in predictions):
            late_s = soonest.ttft_s - work.ttft_slack_s
            return Refuse(_why_late(work, soonest), max(MIN_RETRY_AFTER_S, late_s))
        if (least_s := _least_tpot_s(work, view)) > work.tpot_s:
            text = f"a token takes {_ms(least_s)} even where nobody else is served; {_ms(work.tpot_s)} were asked for"
            return Refuse(text, FULL_RETRY_AFTER_S)
        in_time = [each for each in predictions if each.keeps_ttft]
        best_s = min(each.tpot_s for each in in_time)
        retry_after_s = _room_in_s(request, work, best_s)
        text, useful_s = _why_no_room(work, best_s, in_time), _patience_s(request, work, soonest)
        return Queue(text, useful_s, retry_after_s) if useful_s > 0 else Refuse(text, retry_after_s)


class _Source(Struct, frozen=True):
    """Who computes the prompt, and what that means whoever decodes."""

    ref: WorkerRef
    ttft_s: float
    own_s: float                              # what the prompt adds to the worker's queue
    cost: float
    keeps_ttft: bool


class _Target(Struct, frozen=True):
    """Who decodes, and what that means whoever has computed the prompt."""

    ref: WorkerRef
    side: DecodeSide
    left_free_s: float
    memory: float
    cost: float                               # of memory
    fits: bool
    scale_s: float                            # what a token's time is measured against
    most_s: float                             # a token's time that keeps the promise, were steps as long as the model is wrong
    num_steps: float                          # after the first token's
    error: float                              # of the step model
    slack_s: float                            # until the first token is due
    tp: float                                 # GPUs


def _source(request: RoutingRequest, work: Work, worker: WorkerLoad, estimate: PrefillEstimate) -> _Source:
    scale_s = request.objectives.ttft_s or NO_TTFT_SCALE_S
    cost = worker.tp * _rise(estimate.backlog_s / scale_s, (estimate.backlog_s + estimate.own_s) / scale_s)
    keeps_ttft = (estimate.ttft_s + estimate.spare_s) * (1.0 + worker.step_model.error) <= work.ttft_slack_s
    return _Source(worker.ref, estimate.ttft_s, estimate.own_s, cost, keeps_ttft)


def _target(request: RoutingRequest, work: Work, worker: WorkerLoad, inflow: Inflow) -> _Target:
    promised_s, needed, error = request.objectives.tpot_s, blocks_at_end(worker, work), worker.step_model.error
    freeable = 0 if work.fills_in else worker.filling.num_blocks
    free = worker.num_free_blocks + freeable
    memory = (worker.num_blocks - free + needed) / worker.num_blocks
    return _Target(
        ref=worker.ref,
        side=decode_side(worker, work, inflow),
        left_free_s=work.left_free_s if work.left_free_s == math.inf or _keeps_alone(worker, work.left_free_s) else math.inf,
        memory=memory,
        cost=worker.tp * _rise(1 - free / worker.num_blocks, memory),
        fits=needed + worker.num_decoding <= free,
        scale_s=promised_s or NO_TPOT_SCALE_S,
        most_s=math.inf if promised_s is None or work.num_outputs <= 1 else promised_s / (1 + error),
        num_steps=work.num_outputs - 1 if work.num_outputs > 2 else 1.0,
        error=error,
        slack_s=work.ttft_slack_s,
        tp=worker.tp,
    )


def _keeps_alone(worker: WorkerLoad, tpot_s: float) -> bool:
    """Of a short context that is decoded by itself."""
    alone_s = worker.step_model.decode_s(1.0, 0.0) * (1 + worker.step_model.error)
    return alone_s + beside_s(alone_s, tpot_s) <= tpot_s


def _predict(target: _Target, source: _Source, kv_arrival_s: float) -> Prediction:
    is_local, ttft_s, keeps_ttft, side = source.ref is target.ref, source.ttft_s, source.keeps_ttft, target.side
    has_place = is_local or side.place_s <= kv_arrival_s         # what waits for one there holds one here
    if side.place_s > kv_arrival_s:
        kv_arrival_s = side.place_s
    estimate = estimate_decode(side, kv_arrival_s, source.own_s if is_local else 0.0)
    if is_local and side.place_s:                                # prompts, too, are computed by those alone who have a place
        placed_s = side.place_s + estimate.before_s + source.own_s
        if placed_s > ttft_s:
            ttft_s = kv_arrival_s = placed_s
        keeps_ttft = keeps_ttft and (placed_s + side.place_spread_s) * (1.0 + target.error) <= target.slack_s
    moving_s = (kv_arrival_s - ttft_s) / target.num_steps
    step_cost = target.tp * _rise(estimate.before_s / target.scale_s, (estimate.after_s + moving_s) / target.scale_s)
    joining_s = moving_s if is_local else moving_s + side.waits * estimate.tpot_s / target.num_steps
    tpot_s = estimate.tpot_s + joining_s
    keeps_tpot = target.fits and has_place and (tpot_s <= target.most_s or _keeps_pace(target, estimate.alone_s, joining_s, side.tpot_s))
    leaves_enough = target.left_free_s == math.inf or _keeps_pace(target, estimate.alone_s, 0.0, target.left_free_s)
    return Prediction(
        route=Route(decode=target.ref, prefill=None if is_local else source.ref),
        ttft_s=ttft_s,
        kv_arrival_s=kv_arrival_s,
        tpot_s=tpot_s,
        memory=target.memory,
        cost=source.cost + step_cost + target.cost,
        keeps_ttft=keeps_ttft,
        keeps_tpot=keeps_tpot and leaves_enough,
        keeps_but_for_priority=keeps_tpot and not leaves_enough,
        fits=target.fits,
        has_place=has_place,
    )


def _keeps_pace(target: _Target, alone_s: float, joining_s: float, tpot_s: float) -> bool:
    """Whatever prompts take more than predicted, the pace takes from the next ones: only decodes alone can break the promise."""
    alone_s *= 1 + target.error
    return alone_s + beside_s(alone_s, tpot_s) + joining_s <= tpot_s


def _rank(prediction: Prediction) -> tuple[bool, float]:
    return not (prediction.keeps_ttft and prediction.keeps_tpot), prediction.cost


def _may_stay(request: RoutingRequest) -> bool:
    """At the prefill worker. Without a promise a token its decodes would hold back the prompts there without end, and it can wait."""
    return request.path is None and request.objectives.tpot_s is not None and not request.may_be_late


def _beside_its_prompts(worker: WorkerLoad) -> WorkerLoad:
    """Prompts that wait there take all their blocks when they are admitted, and give none back before they have left."""
    waiting = worker.num_waiting_tokens - worker.num_sent_tokens
    return structs.replace(worker, num_free_blocks=worker.num_free_blocks - math.ceil(waiting / worker.block_size))


def _least_tpot_s(work: Work, view: ClusterView) -> float:
    """Of a worker that has nothing else to do. It is asked only of what would be refused."""
    if work.num_outputs <= 1:
        return 0.0
    context = work.num_tokens + work.num_outputs / 2
    return min(worker.step_model.decode_s(1, context) for worker in (*view.decode, *view.prefill))


def _why_late(work: Work, soonest: Prediction) -> str:
    soonest_at = f"expected in {_ms(soonest.ttft_s)} at the soonest"
    if work.ttft_slack_s <= 0:
        return f"the first token was due {_ms(-work.ttft_slack_s)} ago and is {soonest_at}"
    spare = "" if soonest.ttft_s > work.ttft_slack_s else ", which leaves too little to spare"
    return f"the first token is due in {_ms(work.ttft_slack_s)} and {soonest_at}{spare}"


def _why_no_room(work: Work, best_s: float, in_time: list[Prediction]) -> str:
    asked, best = _ms(work.tpot_s), _ms(best_s)
    if any(each.keeps_but_for_priority for each in in_time):
        return f"nobody in time has room beside the {_ms(work.left_free_s)} a token that priority requests were promised"
    if not any(each.has_place for each in in_time):
        return "nobody in time has a place for it in steps by the time its prompt is computed"
    if best_s > work.tpot_s:
        return f"nobody in time keeps {asked} a token; the best is {best}"
    if not any(each.fits for each in in_time):
        least = min(each.memory for each in in_time)
        return f"nobody in time has memory for it: {least:.0%} of the KV pool would be in use, and decodes there grow"
    return f"nobody in time has room to be sure of {asked} a token; {best} are expected"


def _room_in_s(request: RoutingRequest, work: Work, best_s: float) -> float:
    """Until so many sequences have ended that steps are short enough: they end evenly over the life of an answer."""
    if request.objectives.tpot_s is None:
        return FULL_RETRY_AFTER_S
    return max(MIN_RETRY_AFTER_S, work.num_outputs * (best_s - AIM * request.objectives.tpot_s))


def _patience_s(request: RoutingRequest, work: Work, soonest: Prediction) -> float:
    """How much longer it may wait for room; zero or less: no longer. Who was promised no first token has time."""
    if request.objectives.ttft_s is None:
        return max(0.0, NO_OBJECTIVE_S - work.waited_s)
    waited_s = work.waited_s
    left_s = min(PATIENCE_S - waited_s, work.ttft_slack_s - soonest.ttft_s)
    return left_s if left_s > CLOCK_TICK_S else 0.0


def _rise(before: float, after: float) -> float:
    if before >= MAX_LOAD:
        return 0.0
    rise: float = STEEPNESS ** (after if after < MAX_LOAD else MAX_LOAD) - STEEPNESS**before
    return rise


def _lateness(request: RoutingRequest, work: Work, prediction: Prediction) -> float:
    """How many times over its worst promise; without promises, how long the whole answer takes."""
    ttft = prediction.ttft_s / max(work.ttft_slack_s, 1e-3) if request.objectives.ttft_s is not None else 0.0
    tpot = prediction.tpot_s / request.objectives.tpot_s if request.objectives.tpot_s is not None else 0.0
    answer_s = prediction.ttft_s + prediction.tpot_s * work.num_outputs
    return max(ttft, tpot, prediction.memory) if ttft or tpot else answer_s * max(1.0, prediction.memory)


def _work(request: RoutingRequest, view: ClusterView, now: float) -> Work:
    mean, most = view.mean_outputs.get(request.service_class, FIRST_OUTPUTS_GUESS), request.max_new_tokens
    expected = mean if mean <= most else most
    waited_s = 0.0 if request.arrived_at is None else now - request.arrived_at
    slack_s = math.inf if request.objectives.ttft_s is None else request.objectives.ttft_s - waited_s
    tpot_s = math.inf if request.objectives.tpot_s is None else request.objectives.tpot_s
    is_batch = request.service_class is ServiceClass.BATCH
    due_s = due_in_s(request.service_class, slack_s, waited_s)
    return Work(len(request.token_ids), expected if expected > 1 else 1.0, slack_s, tpot_s, waited_s, is_batch, math.inf, mean, due_s)


def _hashes(request: RoutingRequest, view: ClusterView) -> list[int]:
    return chain(request.token_ids, _chunk_tokens(view)) if view.decode else []


def _chunk_tokens(view: ClusterView) -> int:
    """Of the index's chunks, for both pools."""
    return view.decode[0].block_size


def _num_cached(worker: WorkerLoad, num_known: int, work: Work) -> int:
    """Whole blocks alone are cached, and at least the last token is computed."""
    num_whole, most = num_known // worker.block_size * worker.block_size, work.num_tokens - 1
    return num_whole if num_whole < most else most


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1e3
    return f"{milliseconds:.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"
