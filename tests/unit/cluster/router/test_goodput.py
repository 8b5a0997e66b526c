import math
import random
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.cluster.router.estimate import NOTHING, DecodeEstimate, Inflow, Work, decode_side, estimate_decode, estimate_prefill
from diptych.cluster.router.goodput import PATIENCE_S, Goodput, GoodputOptions
from diptych.cluster.router.load_view import LoadView
from diptych.cluster.router.policy import ClusterView, Objectives, Path, Queue, Refuse, RoutingRequest, WorkerLoad
from diptych.cluster.router.registry import PolicyOptions, make_policy
from diptych.engine.pace import beside_s, enough_rows
from diptych.messages.ids import Address, Epoch, RequestId, WorkerId
from diptych.messages.membership import Member, Membership, Role
from diptych.messages.requests import LoadReport, Route, WorkerRef
from diptych.messages.steps import StepFeatures, StepModel

MODEL = StepModel(5e-3, 22e-6, 9e-10, 18e-6, 3.2e-8, error=0.02, num_observed=1000)
FLAT = StepModel(5e-3, 7e-6, 0.0, 12e-6, 0.0, past_first_s=12e-6, past_second_s=4e-6)
BENT = StepModel(5e-3, 7e-6, 9e-10, 12e-6, 3.2e-8, error=0.02, num_observed=1000, past_first_s=12e-6, past_second_s=4e-6)
ENOUGH = round(enough_rows(FLAT, FLAT.base_s))
CHAT = Objectives(ttft_s=0.4, tpot_s=0.02)
REQUEST = RoutingRequest(tuple(range(1000)), max_new_tokens=4096, objectives=CHAT)


def ref(name: str) -> WorkerRef:
    return WorkerRef(WorkerId(name), Epoch(1), Address(f"fake://{name}"))


def load(
    name: str,
    *,
    waiting: int = 0,
    decoding: int = 0,
    free: int = 1000,
    share: float = 0.0,
    queue: tuple = (),
    sent: int = 0,
    passing: int = 0,
    model: StepModel = MODEL,
) -> WorkerLoad:
    return WorkerLoad(
        ref=ref(name),
        num_requests=decoding + -(-waiting // 1000) + passing,
        num_passing=passing,
        num_waiting_tokens=waiting,
        num_blocks=1000,
        num_free_blocks=free,
        block_size=64,
        prefill_pairs=waiting * 500,
        num_decoding=decoding,
        decode_context=decoding * 1200,
        max_step_tokens=2048,
        prefill_share=share,
        step_model=model,
        num_sent_tokens=sent,
        reported_at=0.0,
        queue=queue,
    )


def view(prefill: list[WorkerLoad], decode: list[WorkerLoad], **fields: object) -> ClusterView:
    return ClusterView(tuple(prefill), tuple(decode), mean_outputs=200.0, **fields)


def policy(**options: object) -> Goodput:
    return Goodput(GoodputOptions(**options))


def decoded(worker: WorkerLoad, work: Work, joins_in_s: float, local_prefill_s: float, inflow: Inflow = NOTHING) -> DecodeEstimate:
    return estimate_decode(decode_side(worker, work, inflow), joins_in_s, local_prefill_s)


def ends_at(under_way: list[float], arrivals: list[tuple[float, int]], now: float) -> float:
    """When a worker that plans one step ahead has computed all prompts, given when they come and their tokens; first come, first served.
    A step in which one ends takes no more than ENOUGH. `under_way`: when its steps end, one or two."""
    queue, free_at = list[int](), under_way[-1]
    while True:
        while arrivals and arrivals[0][0] <= now and not (queue and len(under_way) < 2):
            queue += [each for each in [arrivals.pop(0)[1]] if each]
        if queue and len(under_way) < 2:
            count, room = 0, 2048
            while queue and room > 0:
                taken = min(queue[0], room)
                count, queue[0] = count + taken, queue[0] - taken
                room = min(room - taken, ENOUGH - count)
                queue = [each for each in queue if each]
            free_at = max(free_at, now) + FLAT.step_s(StepFeatures(count))
            under_way.append(free_at)
        elif queue or arrivals:
            now = min(each for each in [*under_way[:1], *(at for at, _ in arrivals[:1])] if each > now)
            under_way = [end for end in under_way if end > now]
        else:
            return free_at


waiting_tokens, sequences, blocks = st.integers(0, 60_000), st.integers(0, 300), st.integers(0, 1000)
workers = st.builds(lambda w, d, f: (w, d, f), waiting_tokens, sequences, blocks)


class TestChoice:
    @given(num_tokens=st.integers(1, 12_000), num_prefill=st.integers(0, 10), num_decode=st.integers(1, 10), seed=st.integers(0, 99))
    def test_an_idle_cluster_admits_whatever_can_be_done_at_all(self, num_tokens, num_prefill, num_decode, seed):
        idle = view([load(f"p{i}") for i in range(num_prefill)], [load(f"d{i}") for i in range(num_decode)])
        request = msgspec.structs.replace(REQUEST, token_ids=tuple(range(num_tokens)))
        best_s = MODEL.step_s(StepFeatures(num_tokens, num_tokens * num_tokens // 2))
        decision = policy(seed=seed).choose(request, idle, 0.0)
        assert isinstance(decision, Route) or best_s * 1.5 > 0.4
        assert isinstance(decision, Route | Refuse)

    @given(st.lists(workers, min_size=1, max_size=6), st.lists(workers, min_size=0, max_size=6), st.integers(0, 99))
    def test_a_route_keeps_both_promises_by_its_own_predictions(self, decode, prefill, seed):
        cluster = view(
            [load(f"p{i}", waiting=w, free=f) for i, (w, _, f) in enumerate(prefill)],
            [load(f"d{i}", waiting=w, decoding=d, free=f) for i, (w, d, f) in enumerate(decode)],
        )
        explanation = policy(seed=seed).explain(REQUEST, cluster, 0.0)
        kept = [each for each in explanation.predictions if each.keeps_both]
        if isinstance(explanation.decision, Route):
            assert explanation.decision == min(kept, key=lambda each: each.cost).route
        else:
            assert not kept

    @pytest.mark.parametrize("waiting", [0, 14_000, 60_000])
    def test_a_decision_comes_with_the_predictions_it_was_taken_on(self, waiting):
        cluster = view([load("p0", waiting=waiting)], [load("d0", waiting=waiting)])
        explanation = policy().decide(REQUEST, cluster, 0.0)
        assert explanation.decision == policy().choose(REQUEST, cluster, 0.0)
        assert len(explanation.predictions) == 2
        assert (explanation.chosen is None) == isinstance(explanation.decision, Refuse)
        if explanation.chosen is not None:
            assert explanation.chosen.route == explanation.decision

    @given(st.sampled_from(Path), st.booleans(), sequences, waiting_tokens, st.integers(0, 99))
    def test_a_request_goes_the_way_that_it_asks_for_or_none(self, path, local_only, decoding, waiting, seed):
        cluster = view([load("p0", waiting=waiting)], [load("d0", decoding=decoding), load("d1")])
        asked = msgspec.structs.replace(REQUEST, path=path)
        explanation = policy(local_only=local_only, seed=seed).decide(asked, cluster, 0.0)
        assert {each.route.prefill is None for each in explanation.predictions} == {path is Path.LOCAL}
        if isinstance(explanation.decision, Route):
            assert (explanation.decision.prefill is None) == (path is Path.LOCAL)

    def test_a_request_that_asks_for_a_prefill_worker_waits_for_one(self):
        asked = msgspec.structs.replace(REQUEST, path=Path.SPLIT)
        decision = policy().choose(asked, view([], [load("d0")]), 0.0)
        assert decision == Queue("no prefill worker is alive beside a decode worker, and the request asks for one")

    def test_a_decision_is_remembered_whichever_way_it_is_asked_for(self):
        request = msgspec.structs.replace(REQUEST, token_ids=tuple(range(6000)))
        router, cluster = policy(), view([load(f"p{i}") for i in range(4)], [load("d0", decoding=50)])
        holder = router.decide(request, cluster, 0.0).decision.prefill
        assert {router.choose(request, cluster, 0.0).prefill for _ in range(5)} == {holder}

    def test_of_pairs_and_local_paths_the_cheapest(self):
        """Prefill workers while they are free, then the idle decode workers' own compute."""
        free, busy = load("p0"), load("p0", waiting=14_000)
        decode = [load("d0", decoding=20), load("d1", decoding=20)]
        assert policy().choose(REQUEST, view([free], decode), 0.0).prefill == free.ref
        assert policy().choose(REQUEST, view([busy], decode), 0.0).prefill is None

    def test_local_only_when_told(self):
        assert policy(local_only=True).choose(REQUEST, view([load("p0")], [load("d0")]), 0.0).prefill is None

    def test_what_cannot_be_in_time_anywhere_is_refused_with_the_time_until_it_could(self):
        cluster = view([load("p0", waiting=60_000)], [load("d0", waiting=60_000)])
        decision = policy().choose(REQUEST, cluster, 0.0)
        assert isinstance(decision, Refuse)
        assert "due in 400 ms" in decision.reason
        assert 0.5 < decision.retry_after_s < 3.0

    def test_what_could_still_be_in_time_waits_for_a_place(self):
        full = view([load("p0", free=0)], [load("d0", decoding=300)])
        assert isinstance(policy().choose(REQUEST, full, 0.0), Queue)
        late = msgspec.structs.replace(REQUEST, arrived_at=0.0)
        assert isinstance(policy().choose(late, full, 0.39), Refuse)

    @pytest.mark.parametrize("lenient", ["serves_late", "may_be_late", "no objectives"])
    def test_it_is_served_late_where_that_is_allowed(self, lenient):
        cluster = view([load("p0", waiting=60_000), load("p1", waiting=50_000)], [load("d0", waiting=60_000, decoding=100)])
        request = msgspec.structs.replace(REQUEST, may_be_late=lenient == "may_be_late")
        if lenient == "no objectives":
            request = msgspec.structs.replace(REQUEST, objectives=Objectives())
        decision = policy(serves_late=lenient == "serves_late").choose(request, cluster, 0.0)
        assert decision == Route(decode=ref("d0"), prefill=ref("p1"))

    def test_a_prefill_worker_decodes_what_decode_workers_have_no_room_for(self):
        full, alone = [load("d0", decoding=300)], Route(decode=ref("p0"))
        assert policy().choose(REQUEST, view([load("p0")], full), 0.0) == alone
        assert policy().choose(REQUEST, view([load("p0", decoding=50)], full), 0.0) == alone, "beside others"
        assert policy().choose(REQUEST, view([load("p0", waiting=4000)], full), 0.0) == alone, "beside prompts, which are handed over"
        with_room = policy().choose(REQUEST, view([load("p0")], [load("d0", decoding=20)]), 0.0)
        assert with_room.decode == ref("d0")

    @given(sequences, waiting_tokens, blocks, sequences, st.integers(0, 99))
    def test_a_prefill_worker_decodes_only_where_both_promises_are_kept_and_nobody_else_keeps_them(
        self, decoding, waiting, free, elsewhere, seed
    ):
        cluster = view([load("p0", decoding=decoding, waiting=waiting, free=free)], [load("d0", decoding=elsewhere)])
        explanation = policy(seed=seed).decide(REQUEST, cluster, 0.0)
        by_itself = [each for each in explanation.predictions if each.route.decode == ref("p0")]
        if by_itself:
            assert explanation.decision == Route(decode=ref("p0"))
            assert by_itself[0].keeps_both
            assert free >= 19 + decoding
        assert not (by_itself and any(each.keeps_both for each in explanation.predictions if each not in by_itself))

    @pytest.mark.parametrize(("options", "path"), [({}, Path.LOCAL), ({}, Path.SPLIT), ({"local_only": True}, None)])
    def test_a_prefill_worker_does_not_decode_where_another_way_is_asked_for(self, options, path):
        asked = msgspec.structs.replace(REQUEST, path=path)
        decision = policy(**options).choose(asked, view([load("p0")], [load("d0", decoding=300)]), 0.0)
        assert isinstance(decision, Queue)

    def test_what_a_prefill_worker_hands_over_is_no_decode_of_its_own(self):
        """Parked for a decode worker that is full: just then it is to serve by itself."""
        full = [load("d0", decoding=300)]
        busy = view([load("p0", decoding=3, passing=60)], full)
        assert policy().choose(REQUEST, busy, 0.0) == Route(decode=ref("p0"))
        alone, beside = (
            estimate_prefill(load("p0", decoding=3, passing=each), Work(1000, 200.0, 0.4, 0.02), 0, 0.0).ttft_s for each in (0, 60)
        )
        assert alone == beside

    @pytest.mark.parametrize("changes", [{"objectives": Objectives()}, {"objectives": Objectives(ttft_s=0.4)}, {"may_be_late": True}])
    def test_what_was_promised_no_pace_or_is_late_waits_for_a_decode_worker(self, changes):
        """Its decodes would hold back prompts without end."""
        cluster = view([load("p0")], [load("d0", decoding=300, free=0)])
        explanation = policy().decide(msgspec.structs.replace(REQUEST, **changes), cluster, 0.0)
        assert all(each.route.decode == ref("d0") for each in explanation.predictions)

    @pytest.mark.parametrize(("decoding", "keeps"), [(50, True), (240, False)])
    def test_a_step_model_that_is_off_closes_no_worker_whose_pace_holds(self, decoding, keeps):
        """Beside prompts a token takes nine tenths of its promise, however long those take. 240 decodes alone: 19 ms, or 20 % more."""
        wrong = msgspec.structs.replace(MODEL, error=0.2)
        busy = load("d0", decoding=decoding, share=0.9, free=1000, model=wrong)
        assert isinstance(policy().choose(REQUEST, view([], [busy]), 0.0), Route) is keeps

    def test_prompts_that_wait_at_a_prefill_worker_will_take_their_blocks(self):
        full = [load("d0", decoding=300)]
        for free, fits in ((19 + 63, True), (19 + 62, False)):              # 4000 tokens are 63 blocks
            decision = policy().choose(REQUEST, view([load("p0", waiting=4000, passing=4, free=free)], full), 0.0)
            assert (decision == Route(decode=ref("p0"))) is fits

    def test_prompts_that_a_prefill_worker_keeps_count_as_sent_there(self):
        router, cluster = policy(), view([load("p0")], [load("d0", decoding=300)])
        assert router.choose(REQUEST, cluster, 0.0) == Route(decode=ref("p0"))
        assert (router._flows["prefill"].tokens_each, router._flows["decode"].tokens_each) == (1000.0, 0.0)

    def test_no_decode_worker_no_route(self):
        assert isinstance(policy().choose(REQUEST, view([load("p0")], []), 0.0), Queue)

    def test_full_workers_get_nothing(self):
        cluster = view([], [load("d0", decoding=5), load("d1", decoding=4)])
        assert policy(max_requests_per_worker=5).choose(REQUEST, cluster, 0.0).decode == ref("d1")
        assert isinstance(policy(max_requests_per_worker=4).choose(REQUEST, cluster, 0.0), Refuse)

    def test_avoids_where_it_failed_if_there_is_another(self):
        cluster = view([], [load("d0"), load("d1", decoding=50)])
        once_failed = msgspec.structs.replace(REQUEST, avoid=frozenset({ref("d0")}))
        assert policy().choose(once_failed, cluster, 0.0).decode == ref("d1")
        assert policy().choose(once_failed, view([], [load("d0")]), 0.0).decode == ref("d0")

    def test_a_prefix_draws_until_its_holder_is_busy(self):
        router = policy()
        cluster = view([load(f"p{i}") for i in range(3)], [load("d0")])
        request = msgspec.structs.replace(REQUEST, token_ids=tuple(range(6400)))
        holder = router.choose(request, cluster, 0.0).prefill
        assert {router.choose(request, cluster, 0.0).prefill for _ in range(10)} == {holder}
        busy = view([load(f"p{i}", waiting=14_000 if ref(f"p{i}") == holder else 0) for i in range(3)], [load("d0")])
        assert router.choose(request, busy, 0.0).prefill != holder

    @pytest.mark.parametrize("block_size", [16, 256])
    def test_pools_of_different_blocks_share_one_index(self, block_size):
        """What is known to be cached is counted in tokens: 6400 are whole blocks of either size."""

        def warm_ttft_s(size: int) -> float:
            router = policy()
            cluster = view([msgspec.structs.replace(load("p0"), block_size=size)], [load("d0", decoding=50)])
            request = msgspec.structs.replace(REQUEST, token_ids=tuple(range(6401)))
            router.choose(request, cluster, 0.0)
            return next(each.ttft_s for each in router.explain(request, cluster, 0.0).predictions if each.route.prefill)

        assert warm_ttft_s(block_size) == warm_ttft_s(64) < 0.02

    def test_a_slow_link_is_paid_for(self):
        """The decode worker would wait for its KV."""
        links = {(ref("p0"), ref("d0")): 5e-3}
        cluster = view([load("p0")], [load("d0")], links=links)
        explanation = policy().explain(REQUEST, cluster, 0.0)
        pair = next(each for each in explanation.predictions if each.route.prefill is not None)
        assert pair.kv_arrival_s == pytest.approx(5.0)
        assert explanation.decision == Route(decode=ref("d0"))

    def test_memory_counts_to_the_expected_end(self):
        """1000 tokens and 200 more are 19 blocks, beside one for each that decodes."""
        for free, fits in ((19, True), (18, False)):
            decision = policy().choose(REQUEST, view([load("p0", free=0)], [load("d0", free=free)]), 0.0)
            assert isinstance(decision, Route) is fits


class TestEstimates:
    work = Work(num_tokens=1000, num_outputs=200.0, ttft_slack_s=0.4)

    @given(waiting_tokens, st.integers(0, 10_000), sequences, st.integers(0, 50), st.floats(0, 0.5))
    def test_a_busier_worker_never_looks_faster(self, waiting, more_waiting, decoding, more_decoding, now):
        less = load("d0", waiting=waiting, decoding=decoding)
        more = load("d0", waiting=waiting + more_waiting, decoding=decoding + more_decoding)
        assert estimate_prefill(more, self.work, 0, now).backlog_s >= estimate_prefill(less, self.work, 0, now).backlog_s - 1e-9
        assert decoded(more, self.work, 0.1, 0.0).tpot_s >= decoded(less, self.work, 0.1, 0.0).tpot_s - 1e-9

    @given(waiting_tokens, st.integers(0, 20_000))
    def test_a_longer_queue_never_looks_sooner_but_for_the_step_it_ends(self, waiting, more_waiting):
        less, more = (estimate_prefill(load("p0", waiting=each), self.work, 0, 0.0).ttft_s for each in (waiting, waiting + more_waiting))
        assert more >= less - 1e-9

    @given(st.integers(0, 999), st.integers(0, 999))
    def test_a_longer_cached_prefix_never_looks_slower(self, one, other):
        short, long = sorted((one, other))
        assert estimate_prefill(load("p0"), self.work, long, 0.0).own_s <= estimate_prefill(load("p0"), self.work, short, 0.0).own_s

    @given(st.floats(0, 0.9), st.floats(0, 0.9))
    def test_prompts_beside_decodes_stretch_them(self, one, other):
        low, high = sorted((one, other))
        slow, fast = (decoded(load("d0", decoding=50, share=share), self.work, 0.0, 0.0).tpot_s for share in (high, low))
        assert slow >= fast

    def test_in_deadline_order_what_is_due_later_is_not_ahead(self):
        queue = ((0.1, 4000), (5.0, 6000))
        worker = load("p0", waiting=10_000, queue=queue)
        urgent, patient = (estimate_prefill(worker, Work(1000, 200.0, slack_s), 0, 0.0).ttft_s for slack_s in (0.4, math.inf))
        alone = estimate_prefill(load("p0", waiting=4000), self.work, 0, 0.0).ttft_s
        assert urgent == pytest.approx(alone, rel=0.1)
        assert patient > 2 * urgent

    def test_work_is_done_between_reports(self):
        worker = load("p0", waiting=10_000)
        assert estimate_prefill(worker, self.work, 0, 0.1).ttft_s == pytest.approx(estimate_prefill(worker, self.work, 0, 0.0).ttft_s - 0.1)
        assert estimate_prefill(worker, self.work, 0, 10.0).backlog_s == 0.0

    def test_a_step_under_way_is_waited_for(self):
        idle, busy = load("p0"), msgspec.structs.replace(load("p0"), busy_s=0.05)
        idle_s, busy_s, over_s = (estimate_prefill(each, self.work, 0, at).ttft_s for each, at in ((idle, 0.0), (busy, 0.0), (busy, 0.05)))
        assert busy_s == pytest.approx(idle_s + 0.05)
        assert over_s == pytest.approx(idle_s)

    @given(st.integers(1, 200), st.floats(0.008, 0.05))
    def test_prompts_beside_decodes_get_what_their_pace_leaves(self, decoding, tpot_s):
        """Chunks and decodes in turn, step by step, as the worker's pacer gives them out."""
        worker, decode_s = load("d0", decoding=decoding, model=BENT), BENT.decode_s(decoding, decoding * 1200)
        estimate = estimate_prefill(worker, Work(4000, 200.0, 0.4, tpot_s), 0, 0.0)
        room_s = beside_s(decode_s, tpot_s)
        left, at_s, lead_s = 4000.0, decode_s, room_s            # a step of decodes alone has been planned when the prompt comes
        while left > 1e-6:
            count = min(left, 2048 - decoding, BENT.tokens_within(room_s + lead_s, 2000.5, decoding))
            prompts_s = BENT.prefill_s(count, 2000.5 * count, decoding)
            left, at_s, lead_s = left - count, at_s + decode_s + prompts_s, lead_s + room_s - prompts_s
        assert estimate.ttft_s == pytest.approx(at_s)

    @given(
        decoding=st.integers(1, 99),
        tpot_s=st.sampled_from((0.01, 0.02, 0.05)),
        waiting=st.just(0) | st.integers(1, 6000),
        own=st.integers(1, 4000),
        left_share=st.floats(0.02, 1),
        age_s=st.floats(0, 0.05),
        is_ahead=st.booleans(),
        lead_s=st.floats(0, 0.05),
    )
    def test_a_worker_that_decodes_goes_on_after_its_report(self, decoding, tpot_s, waiting, own, left_share, age_s, is_ahead, lead_s):
        """Against the worker itself, told step by step: with nothing else to do it plans decodes alone, which get ahead of their pace and
        lend that to prompts, until one has ended and decodes."""
        message_s, decode_s, told_s = 1e-3, FLAT.decode_s(decoding, 0), lead_s
        enough = enough_rows(FLAT, decode_s) - decoding
        now, queue, came = -message_s - age_s, [float(waiting), 0.0], False
        first_s = left_share * decode_s
        ends = [now + first_s, now + first_s + decode_s] if is_ahead else [now + first_s]
        while sum(queue) > 1e-9 or not came:
            while len(ends) < 2 and (sum(queue) > 1e-9 or not came):
                room_s = beside_s(decode_s, tpot_s) + lead_s
                most = max(1.0, min(2048 - decoding, FLAT.tokens_within(room_s, 0, decoding)))
                first = min(queue[0], most)
                count = min(sum(queue), max(first, min(most, enough)) if 0 < queue[0] == first else most)
                queue = [queue[0] - first, queue[1] - (count - first)]
                prompts_s = FLAT.prefill_s(count, 0, decoding)
                has_joined = 0 < count < 2048 - decoding or (first > 0 and queue[0] == 0)
                lead_s = 0.0 if has_joined else max(0.0, lead_s + beside_s(decode_s, tpot_s) - prompts_s)
                ends.append(max(ends[-1], now) + decode_s + prompts_s)
            if not came and message_s <= ends[0]:
                now, queue[1], came = message_s, own, True
            else:
                now = ends.pop(0)
        worker = msgspec.structs.replace(
            load("d0", waiting=waiting, decoding=decoding, model=FLAT),
            decode_context=0,
            prefill_pairs=0,
            num_requests=decoding,
            busy_s=first_s + decode_s * is_ahead,
            plans_in_s=first_s * is_ahead,
            message_s=message_s,
            lead_s=told_s,
        )
        estimate = estimate_prefill(worker, Work(own, 200.0, 0.4, tpot_s), 0, age_s)
        assert estimate.ttft_s == pytest.approx(ends[-1] + message_s, abs=1e-6)

    @given(st.integers(1, 99), st.integers(1, 9000), st.floats(1e-4, 0.2), st.sampled_from((0.01, 0.02, math.inf)))
    def test_what_decodes_lend_makes_a_prompt_sooner_and_who_is_about_to_join_lends_nothing(self, decoding, own, lead_s, tpot_s):
        """But for rows that are cheap in a short step: chunks of different lengths have fewer of them."""
        plain = load("d0", decoding=decoding, model=FLAT)
        ahead = msgspec.structs.replace(plain, lead_s=lead_s)
        joined = (msgspec.structs.replace(each, num_expected=1) for each in (plain, ahead))
        work = Work(own, 200.0, 0.4, tpot_s)
        plain_s, ahead_s, *joined_s = (estimate_prefill(each, work, 0, 0.0).ttft_s for each in (plain, ahead, *joined))
        assert ahead_s <= plain_s + FLAT.base_s
        assert joined_s == [plain_s, plain_s]

    @given(st.integers(1, 9000), st.integers(0, 9000), st.floats(0, 1e5))
    def test_later_prompts_share_a_step_only_until_it_is_long_enough(self, own, waiting, rate):
        busy = msgspec.structs.replace(load("p0", waiting=waiting, model=FLAT), busy_s=0.03, plans_in_s=0.02)
        alone_s, shared_s = (estimate_prefill(busy, Work(own, 200.0, 0.4), 0, 0.0, Inflow(each)).ttft_s for each in (0.0, rate))
        assert alone_s - 1e-9 <= shared_s <= alone_s + FLAT.step_s(StepFeatures(ENOUGH)) - FLAT.base_s + 1e-9

    @given(
        waiting=st.integers(0, 9000),
        sent=st.integers(0, 2000),
        own=st.integers(1, 9000),
        busy_s=st.floats(0.007, 0.05),
        planned_share=st.just(0.0) | st.floats(1e-3, 1),
        message_s=st.sampled_from((0.0, 3e-3)),
    )
    def test_a_prefill_worker_plans_one_step_ahead(self, waiting, sent, own, busy_s, planned_share, message_s):
        """Against the worker itself, told step by step."""
        worker = msgspec.structs.replace(
            load("p0", waiting=waiting + sent, sent=sent, model=FLAT),
            busy_s=busy_s,
            plans_in_s=busy_s * planned_share,
            sent_at=0.0,
            message_s=message_s,
        )
        under_way = [busy_s * planned_share - message_s, busy_s - message_s][0 if planned_share else 1 :]
        came_s = ends_at(under_way, [(-message_s, waiting), (message_s, sent), (message_s, own)], -message_s) + message_s
        prompts_apart_s = 0.0 if not waiting or not sent else 2 * FLAT.base_s
        assert estimate_prefill(worker, Work(own, 200.0, 0.4), 0, 0.0).ttft_s == pytest.approx(came_s, abs=prompts_apart_s + 1e-9)

    def test_on_an_idle_worker_it_takes_its_step_and_two_messages(self):
        idle = msgspec.structs.replace(load("p0", model=FLAT), message_s=2e-3)
        ttft_s = estimate_prefill(idle, self.work, 0, 0.03).ttft_s
        assert ttft_s == pytest.approx(FLAT.step_s(StepFeatures(1000)) + 4e-3)

    def test_what_was_sent_was_not_begun_before_it_came(self):
        """However old the report is."""
        sent = msgspec.structs.replace(load("p0", waiting=1000, sent=1000, model=FLAT), sent_at=0.035)
        assert estimate_prefill(sent, self.work, 0, 0.04).ttft_s == pytest.approx(2 * FLAT.step_s(StepFeatures(1000)) - 0.005)

    @given(st.floats(0, 1e5), st.floats(0, 1e5))
    def test_later_prompts_share_its_step_as_far_as_there_is_room(self, one, other):
        busy = msgspec.structs.replace(load("p0", model=FLAT), busy_s=0.03, plans_in_s=0.02)
        few_s, many_s = (estimate_prefill(busy, Work(100, 200.0, 0.4), 0, 0.0, Inflow(rate)).ttft_s for rate in sorted((one, other)))
        alone_s, full_s = (0.03 + FLAT.step_s(StepFeatures(tokens)) for tokens in (100, ENOUGH))
        assert alone_s - 1e-9 <= few_s <= many_s <= full_s + 1e-9

    @given(st.integers(0, 250), st.floats(0, 0.9))
    def test_prompts_stretch_decodes_no_further_than_their_pace(self, decoding, share):
        estimate = decoded(load("d0", decoding=decoding, share=share), Work(1000, 200.0, 0.4, 0.02), 0.0, 0.0)
        alone_s = MODEL.decode_s(decoding + 1, decoding * 1200 + 1100)
        assert alone_s <= estimate.tpot_s <= alone_s + beside_s(alone_s, 0.02) + 1e-12

    def test_what_other_gateways_sent_is_guessed(self):
        inflow = Inflow(tokens_per_s=20_000, num_others=3, num_joining=10.0)
        assert estimate_prefill(load("p0"), self.work, 0, 0.05, inflow).backlog_s == pytest.approx(20_000 * 0.75 * 0.05 * 22e-6)
        assert decoded(load("d0"), self.work, 0.0, 0.0, inflow).tpot_s > decoded(load("d0"), self.work, 0.0, 0.0).tpot_s

    def test_of_few_large_prompts_more_may_have_come_unseen_than_of_many_small_ones(self):
        small, large = (Inflow(tokens_per_s=20_000, tokens_each=each, num_others=3) for each in (100.0, 4000.0))
        expected_s = 20_000 * 0.75 * 0.05 * 22e-6
        small_s, large_s = (estimate_prefill(load("p0"), self.work, 0, 0.05, inflow).backlog_s for inflow in (small, large))
        assert expected_s < small_s < large_s
        assert estimate_prefill(load("p0"), self.work, 0, 0.05, Inflow(20_000, 4000.0, 0)).backlog_s == 0.0

    @given(st.integers(0, 20_000), st.integers(0, 20_000), st.integers(0, 7))
    def test_room_that_one_sees_all_see(self, sent, more, num_others):
        """What this gateway sent on the same report, the others are taken to have sent as well."""
        inflow = Inflow(num_others=num_others)
        some, much = (load("p0", waiting=40_000, sent=tokens) for tokens in (sent, sent + more))
        less_s, more_s = (estimate_prefill(worker, self.work, 0, 0.0, inflow).backlog_s for worker in (some, much))
        assert more_s - less_s == pytest.approx(MODEL.prefill_s(num_others * more, 0))

    def test_by_the_join_some_have_ended(self):
        full = load("d0", decoding=200)
        now, later = (decoded(msgspec.structs.replace(full, num_requests=100), self.work, at_s, 0.0).tpot_s for at_s in (0.0, 1.0))
        assert later == now, "the load of a cluster that is in use is not believed to shrink"
        joined = msgspec.structs.replace(full, num_requests=260)
        assert decoded(joined, self.work, 1.0, 0.0).tpot_s < decoded(joined, self.work, 0.0, 0.0).tpot_s


class TestPatience:
    """Decode workers that are full by TPOT, prefill workers that are idle."""

    full = view([load("p0", free=0)], [load("d0", decoding=300, free=900)])

    @given(waited_s=st.floats(0, 1), ttft_s=st.floats(0.01, 10), decoding=st.integers(0, 300), waiting=st.integers(0, 20_000))
    def test_nobody_waits_longer_than_that_to_be_refused(self, waited_s, ttft_s, decoding, waiting):
        objectives = Objectives(ttft_s, 0.02)
        request = msgspec.structs.replace(REQUEST, objectives=objectives, arrived_at=0.0)
        cluster = view([load("p0", waiting=waiting)], [load("d0", decoding=decoding, free=900)])
        decision = policy().choose(request, cluster, waited_s)
        if isinstance(decision, Queue):
            assert 0 < decision.useful_s <= PATIENCE_S - waited_s + 1e-9
            assert waited_s + decision.useful_s < ttft_s

    def test_after_its_patience_it_is_refused_with_the_numbers(self):
        request = msgspec.structs.replace(REQUEST, arrived_at=0.0)
        assert isinstance(policy().choose(request, self.full, 0.0), Queue)
        decision = policy().choose(request, self.full, PATIENCE_S)
        assert isinstance(decision, Refuse)
        assert "20 ms a token" in decision.reason
        assert decision.retry_after_s > 0

    def test_who_was_promised_no_first_token_has_time(self):
        decision = policy().choose(msgspec.structs.replace(REQUEST, objectives=Objectives(None, 0.02), arrived_at=0.0), self.full, 50.0)
        assert isinstance(decision, Queue)
        assert decision.useful_s == math.inf

    @given(st.integers(200, 300), st.integers(1, 50))
    def test_the_fuller_the_later_to_try_again(self, decoding, more):
        request = msgspec.structs.replace(REQUEST, arrived_at=-PATIENCE_S)
        some, many = (policy().choose(request, view([], [load("d0", decoding=n, free=900)]), 0.0) for n in (decoding, decoding + more))
        if isinstance(some, Refuse):
            assert many.retry_after_s >= some.retry_after_s

    def test_a_long_prompt_alone_is_not_taken_with_a_third_to_spare(self):
        """Nobody interrupts its computing: only the wait for its turn is uncertain."""
        prompt = msgspec.structs.replace(REQUEST, token_ids=tuple(range(40_000)), objectives=Objectives(2.0, 0.02))
        own_s = MODEL.prefill_s(40_000, 40_000 * 20_000)
        assert 1.54 < own_s < 1.9
        assert isinstance(policy().choose(prompt, view([load("p0")], [load("d0")]), 0.0), Route)
        busy = view([load("p0", waiting=15_000)], [load("d0", waiting=15_000)])
        assert isinstance(policy().choose(prompt, busy, 0.0), Refuse)


class TestCluster:
    """With the real load view."""

    def members(self, draining: str = "") -> Membership:
        names = [(Role.PREFILL, f"p{i}") for i in range(8)] + [(Role.DECODE, f"d{i}") for i in range(8)]
        addresses = tuple(Address(f"fake://g{i}") for i in range(4))
        workers = tuple(Member(ref(name), role, "l", 64, 12_800, 131_072, draining=name == draining) for role, name in names)
        return Membership(len(draining), workers, addresses)

    def reports(self) -> list[LoadReport]:
        return [
            LoadReport(each.ref, 0, 0, 0, 0, 12_800, 12_800, 64, StepFeatures(), (), 2048, 0.0, MODEL) for each in self.members().workers
        ]

    def gateway(self, number: int) -> tuple[LoadView, Goodput]:
        loads = LoadView(silent_after_s=3.0)
        loads.set_membership(self.members(), 0.0)
        for report in self.reports():
            loads.heard(report.worker, report, 0.0)
        return loads, policy(seed=2 * number)

    def test_no_herd_of_four_gateways_on_stale_views(self):
        """500 requests at once, no report in between: everybody gets a share, and prefill is spread over all 16."""
        gateways, draw = [self.gateway(i) for i in range(4)], random.Random(1)
        prefilled, decoded = Counter[str](), Counter[str]()
        for number in range(500):
            loads, router = gateways[number % 4]
            request = msgspec.structs.replace(REQUEST, token_ids=(number,) * draw.randrange(200, 800), objectives=Objectives(1.0, 0.05))
            decision = router.choose(request, loads.view(0.001), 0.001)
            if isinstance(decision, Route):
                loads.sent(RequestId(str(number)), decision, len(request.token_ids), 0.001)
                prefilled[decision.first.worker_id] += 1
                decoded[decision.decode.worker_id] += 1
        assert sum(prefilled.values()) > 300
        assert max(decoded.values()) <= 1.5 * sum(decoded.values()) / 8
        of_prefill_workers = {name: count for name, count in prefilled.items() if name.startswith("p")}
        assert max(of_prefill_workers.values()) <= 1.5 * sum(of_prefill_workers.values()) / 8

    @settings(max_examples=20)
    @given(st.sampled_from([f"{role}{i}" for role in "pd" for i in range(8)]), st.sampled_from(["draining", "silent", "gone"]))
    def test_never_to_who_drains_or_is_dead(self, name, how):
        loads, router = self.gateway(0)
        now = 0.0
        if how == "draining":
            loads.set_membership(self.members(draining=name), now)
        elif how == "gone":
            members = tuple(each for each in self.members().workers if each.ref.worker_id != name)
            loads.set_membership(Membership(5, members, ()), now)
        else:
            now = 4.0
            for report in self.reports():
                if report.worker.worker_id != name:
                    loads.heard(report.worker, report, now)
        for number in range(40):
            decision = router.choose(msgspec.structs.replace(REQUEST, token_ids=(number,) * 300), loads.view(now), now)
            assert isinstance(decision, Route)
            assert name not in (decision.decode.worker_id, decision.prefill and decision.prefill.worker_id)

    def test_links_and_lengths_are_learnt(self):
        loads, _ = self.gateway(0)
        route = Route(decode=ref("d0"), prefill=ref("p0"))
        loads.moved(route, num_tokens=1000, transfer_s=0.5)
        loads.ended(RequestId("r"), route, num_outputs=100)
        loads.ended(RequestId("s"), route)
        seen = loads.view(0.0)
        assert seen.links == {(ref("p0"), ref("d0")): 0.5e-3}
        assert (seen.mean_outputs, seen.num_gateways) == (100, 4)


def test_the_spec_names_it():
    router = make_policy("goodput", PolicyOptions(local_path=True, seed=3))
    assert router.choose(REQUEST, view([load("p0")], [load("d0")]), 0.0) == Route(decode=ref("d0"))


def test_without_reports_it_still_routes():
    strangers = ClusterView((), (WorkerLoad(ref("d0"), 0, 0, 1000, 1000, 64),))
    assert policy().choose(REQUEST, strangers, 0.0) == Route(decode=ref("d0"))
