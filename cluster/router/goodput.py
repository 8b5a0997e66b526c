"""Sends a request where both its promises are predicted to be kept, at the least cost to the cluster.

    every (P, D) pair and every local path of a sample of the pools
        │ estimate.py: TTFT, KV arrival, TPOT, memory
        ▼
    some keep both promises ──► Route: of those, the one that uses least capacity
    none, but TTFT could still be kept ──► Queue: somebody may end within PATIENCE_S
    nobody did, or none can keep TTFT ──► Refuse, with the time until one could; or, if it may be late, Route: the least late

*Capacity used* is the rise of a potential: each resource touched (a prefill queue against TTFT, a decode step against TPOT, KV memory)
is priced STEEPNESS**load, so a worker near its limit is dear and an idle one nearly free. (Exponential prices on loads are what makes
online assignment competitive: Aspnes, Azar, Fiat, Plotkin, Waarts, "On-line routing of virtual circuits with applications to load
balancing and machine scheduling", JACM 1997.)

Of a pool larger than ALL_UP_TO, SAMPLE workers are drawn for each request, and the one with the longest prefix of the prompt is added:
gateways that share a stale view do not all run to the same worker.
"""

import math
import random
from collections.abc import Sequence

from msgspec import Struct

from ...engine.pace import AIM
from ...messages.requests import Route, WorkerRef
from .estimate import NOTHING, Inflow, PrefillEstimate, Work, blocks_at_end, estimate_decode, estimate_prefill
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
from .prefix_aware import PrefixIndex, chain

ALL_UP_TO = 4
SAMPLE = 2
STEEPNESS = 50.0
PATIENCE_S = 0.04                             # so long a request waits at its gateway for room: longer ones come to the workers in a hurry
MAX_LOAD = 4.0                                # loads beyond are equally hopeless
FIRST_OUTPUTS_GUESS = 128.0                   # tokens, until an answer has ended
NO_TTFT_SCALE_S = 1.0                         # what queues are measured against without an objective
NO_TPOT_SCALE_S = 0.05
MIN_RETRY_AFTER_S = 0.1
FULL_RETRY_AFTER_S = 1.0
FLOW_HORIZON_S = 1.0
CLOCK_TICK_S = 1e-6                           # what is nearer than that is now


class GoodputOptions(Struct, frozen=True):
    local_only: bool = False
    max_requests_per_worker: int = 1024
    serves_late: bool = False                 # what cannot keep its promises is served as well as it can be, not refused
    seed: int = 0


class Flow:
    """Tokens of prompts over the last second, forgotten exponentially."""

    def __init__(self) -> None:
        self._rate = 0.0
        self._squares = 0.0                   # the same of their squares
        self._at = 0.0

    def add(self, num_tokens: int, now: float) -> None:
        kept = self._kept(now)
        self._rate = self._rate * kept + num_tokens / FLOW_HORIZON_S
        self._squares = self._squares * kept + num_tokens * num_tokens / FLOW_HORIZON_S
        self._at = now

    def per_s(self, now: float) -> float:
        return self._rate * self._kept(now)

    @property
    def tokens_each(self) -> float:
        """Mean of squares by mean."""
        return self._squares / self._rate if self._rate else 0.0

    def _kept(self, now: float) -> float:
        return math.exp(-max(0.0, now - self._at) / FLOW_HORIZON_S)


class Goodput:
    def __init__(self, options: GoodputOptions, index: PrefixIndex | None = None) -> None:
        self._options = options
        self._index = index or PrefixIndex()
        self._random = random.Random(options.seed)
        self._flows = {"prefill": Flow(), "decode": Flow()}      # prompt tokens sent to be computed in each pool

    def choose(self, request: RoutingRequest, view: ClusterView, now: float) -> Decision:
        return self.decide(request, view, now).decision

    def decide(self, request: RoutingRequest, view: ClusterView, now: float) -> Explanation:
        hashes = _hashes(request, view)
        explanation = self._explain(request, view, now, hashes)
        decision = explanation.decision
        if isinstance(decision, Route):
            self._flows["decode" if decision.prefill is None else "prefill"].add(len(request.token_ids), now)
            self._index.insert(hashes, *(worker for worker in (decision.prefill, decision.decode) if worker is not None))
        return explanation

    def explain(self, request: RoutingRequest, view: ClusterView, now: float) -> Explanation:
        """What `choose` would say and why (on another sample of the pools); nothing is remembered."""
        return self._explain(request, view, now, _hashes(request, view))

    def _explain(self, request: RoutingRequest, view: ClusterView, now: float, hashes: Sequence[int]) -> Explanation:
        work = _work(request, view, now)
        if (missing := what_is_missing(request, view)) is not None:
            return Explanation(Queue(missing), (), work.num_outputs, work.ttft_slack_s)
        predictions = self._predictions(request, work, view, now, hashes)
        decision = self._decide(request, work, predictions)
        return Explanation(decision, tuple(predictions), work.num_outputs, work.ttft_slack_s)

    def _predictions(
        self, request: RoutingRequest, work: Work, view: ClusterView, now: float, hashes: Sequence[int]
    ) -> list[Prediction]:
        prefill = prefill_pool(request, view, self._options.local_only)
        depths = self._index.holders(hashes)

        def prefilled(worker: WorkerLoad, inflow: Inflow) -> _Prefilled:
            num_cached = _num_cached(worker, depths.get(worker.ref, 0) * _chunk_tokens(view), work) if depths else 0
            estimate = estimate_prefill(worker, work, num_cached, now, inflow)
            scale_s = request.objectives.ttft_s or NO_TTFT_SCALE_S
            return _Prefilled(worker, estimate, _rise(estimate.backlog_s / scale_s, (estimate.backlog_s + estimate.own_s) / scale_s))

        there, here = self._inflow("prefill", prefill, view, now), self._inflow("decode", view.decode, view, now)
        senders = [prefilled(worker, there) for worker in self._sample(request, prefill, depths)]
        predictions = []
        for decode in self._sample(request, view.decode, depths):
            place = _place(decode, work)
            if request.path is not Path.SPLIT:
                own = prefilled(decode, here)
                predictions.append(_predict(request, work, own, place, own.estimate.ttft_s, here))
            for sender in senders:
                moved_s = view.links.get((sender.worker.ref, decode.ref), 0.0) * work.num_tokens
                predictions.append(_predict(request, work, sender, place, max(sender.estimate.ttft_s, moved_s), here))
        predictions.sort(key=lambda each: (not each.keeps_both, each.cost))
        return predictions

    def _inflow(self, pool_name: str, pool: Sequence[WorkerLoad], view: ClusterView, now: float) -> Inflow:
        if not pool:
            return NOTHING
        gateways_per_worker, flow = view.num_gateways / len(pool), self._flows[pool_name]
        return Inflow(
            tokens_per_s=flow.per_s(now) * gateways_per_worker,
            tokens_each=flow.tokens_each,
            num_others=view.num_gateways - 1,
            num_joining=sum([worker.num_expected for worker in pool]) * gateways_per_worker if pool_name == "decode" else 0.0,
        )

    def _sample(self, request: RoutingRequest, pool: Sequence[WorkerLoad], depths: dict[WorkerRef, int]) -> list[WorkerLoad]:
        """Of those that take more, SAMPLE drawn at random and the one that holds most of the prompt."""
        limit = self._options.max_requests_per_worker
        below = [worker for worker in pool if worker.num_requests < limit]
        usable = [worker for worker in below if worker.ref not in request.avoid] if request.avoid else below
        usable = usable or below
        if len(usable) <= ALL_UP_TO:
            return usable
        drawn = self._draw(usable)
        if not depths:
            return drawn
        holder = max(usable, key=lambda worker: depths.get(worker.ref, 0))
        return drawn if holder in drawn or holder.ref not in depths else [*drawn, holder]

    def _draw(self, usable: list[WorkerLoad]) -> list[WorkerLoad]:
        """SAMPLE = 2 different ones, in a fifth of the time that random.sample takes."""
        first, second = int(self._random.random() * len(usable)), int(self._random.random() * (len(usable) - 1))
        return [usable[first], usable[second + (second >= first)]]

    def _decide(self, request: RoutingRequest, work: Work, predictions: list[Prediction]) -> Decision:
        if not predictions:
            return Refuse(f"every worker has {self._options.max_requests_per_worker} requests or more", FULL_RETRY_AFTER_S)
        if predictions[0].keeps_both:
            return predictions[0].route
        if request.may_be_late or self._options.serves_late or (request.objectives.ttft_s is None and request.objectives.tpot_s is None):
            return min(predictions, key=lambda each: _lateness(request, work, each)).route
        soonest = min(predictions, key=lambda each: each.ttft_s)
        if not any(each.keeps_ttft for each in predictions):
            late_s = soonest.ttft_s - work.ttft_slack_s
            due, soonest_at = _ms(work.ttft_slack_s), _ms(soonest.ttft_s)
            text = f"the first token is due in {due} and expected in {soonest_at} at the soonest, which leaves too little to spare"
            return Refuse(text, max(MIN_RETRY_AFTER_S, late_s))
        best_s = min(each.tpot_s for each in predictions)
        retry_after_s = _room_in_s(request, work, best_s)
        text = f"nobody has room and keeps {_ms(request.objectives.tpot_s)} a token; the best is {_ms(best_s)}"
        useful_s = _patience_s(request, work, soonest)
        return Queue(text, useful_s, retry_after_s) if useful_s > 0 else Refuse(text, retry_after_s)


class _Prefilled(Struct, frozen=True):
    """By a prefill worker, or by the decode worker itself."""

    worker: WorkerLoad
    estimate: PrefillEstimate
    cost: float


class _Place(Struct, frozen=True):
    """In a decode worker's memory, whoever computes the prompt."""

    decode: WorkerLoad
    memory: float                             # share of the pool, with the request at its end
    cost: float
    fits: bool


def _place(decode: WorkerLoad, work: Work) -> _Place:
    needed, held = blocks_at_end(decode, work), decode.num_blocks - decode.num_free_blocks
    memory = (held + needed) / decode.num_blocks
    fits = needed + decode.num_decoding <= decode.num_free_blocks
    return _Place(decode, memory, _rise(held / decode.num_blocks, memory), fits)


def _predict(
    request: RoutingRequest, work: Work, prefilled: _Prefilled, place: _Place, kv_arrival_s: float, inflow: Inflow
) -> Prediction:
    prefill, decode, objectives = prefilled.estimate, place.decode, request.objectives
    is_local = prefilled.worker is decode
    estimate = estimate_decode(decode, work, kv_arrival_s, prefill.own_s if is_local else 0.0, inflow)
    joining_s = (kv_arrival_s - prefill.ttft_s) / max(1.0, work.num_outputs - 1)
    scale_s, tpot_s = objectives.tpot_s or NO_TPOT_SCALE_S, estimate.tpot_s + joining_s
    in_pace = objectives.tpot_s is None or work.num_outputs <= 1 or tpot_s * (1 + _error(decode)) <= objectives.tpot_s
    return Prediction(
        route=Route(decode=decode.ref, prefill=None if is_local else prefilled.worker.ref),
        ttft_s=prefill.ttft_s,
        kv_arrival_s=kv_arrival_s,
        tpot_s=tpot_s,
        memory=place.memory,
        cost=prefilled.cost + _rise(estimate.before_s / scale_s, (estimate.after_s + joining_s) / scale_s) + place.cost,
        keeps_ttft=(prefill.ttft_s + prefill.spare_s) * (1 + _error(prefilled.worker)) <= work.ttft_slack_s,
        keeps_tpot=in_pace and place.fits,
    )


def _room_in_s(request: RoutingRequest, work: Work, best_s: float) -> float:
    """Until so many sequences have ended that steps are short enough: they end evenly over the life of an answer."""
    if request.objectives.tpot_s is None:
        return FULL_RETRY_AFTER_S
    excess = 1 - AIM * request.objectives.tpot_s / best_s
    return max(MIN_RETRY_AFTER_S, excess * work.num_outputs * best_s)


def _patience_s(request: RoutingRequest, work: Work, soonest: Prediction) -> float:
    """How much longer it may wait for room; zero or less: no longer. Who was promised no first token has time."""
    if request.objectives.ttft_s is None:
        return math.inf
    waited_s = request.objectives.ttft_s - work.ttft_slack_s
    left_s = min(PATIENCE_S - waited_s, work.ttft_slack_s - soonest.ttft_s)
    return left_s if left_s > CLOCK_TICK_S else 0.0


def _error(worker: WorkerLoad) -> float:
    return worker.step_model.error if worker.step_model else 0.0


def _rise(before: float, after: float) -> float:
    if before >= MAX_LOAD:
        return 0.0
    return float(STEEPNESS ** (after if after < MAX_LOAD else MAX_LOAD) - STEEPNESS**before)


def _lateness(request: RoutingRequest, work: Work, prediction: Prediction) -> float:
    """How many times over its worst promise; without promises, how long the whole answer takes."""
    ttft = prediction.ttft_s / max(work.ttft_slack_s, 1e-3) if request.objectives.ttft_s is not None else 0.0
    tpot = prediction.tpot_s / request.objectives.tpot_s if request.objectives.tpot_s is not None else 0.0
    answer_s = prediction.ttft_s + prediction.tpot_s * work.num_outputs
    return max(ttft, tpot, prediction.memory) if ttft or tpot else answer_s * max(1.0, prediction.memory)


def _work(request: RoutingRequest, view: ClusterView, now: float) -> Work:
    expected = min(view.mean_outputs or FIRST_OUTPUTS_GUESS, request.max_new_tokens)
    waited_s = 0.0 if request.arrived_at is None else now - request.arrived_at
    slack_s = math.inf if request.objectives.ttft_s is None else request.objectives.ttft_s - waited_s
    tpot_s = math.inf if request.objectives.tpot_s is None else request.objectives.tpot_s
    return Work(len(request.token_ids), max(1.0, expected), slack_s, tpot_s)


def _hashes(request: RoutingRequest, view: ClusterView) -> list[int]:
    return chain(request.token_ids, _chunk_tokens(view)) if view.decode else []


def _chunk_tokens(view: ClusterView) -> int:
    """Of the index's chunks, for both pools."""
    return view.decode[0].block_size


def _num_cached(worker: WorkerLoad, num_known: int, work: Work) -> int:
    """Whole blocks alone are cached, and at least the last token is computed."""
    return min(num_known // worker.block_size * worker.block_size, work.num_tokens - 1)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f} ms"
