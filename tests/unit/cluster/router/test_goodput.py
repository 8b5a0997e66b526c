import random
from collections import Counter

import msgspec
import pytest
from harness.loads import MODEL, REQUEST, load, policy, ref, view
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.cluster.router.estimate import Work, estimate_prefill
from diptych.cluster.router.goodput import PATIENCE_S, Goodput
from diptych.cluster.router.load_view import LoadView
from diptych.cluster.router.policy import ClusterView, Objectives, Path, Queue, Refuse, WorkerLoad
from diptych.cluster.router.registry import PolicyOptions, make_policy
from diptych.engine.urgency import NO_OBJECTIVE_S
from diptych.messages.ids import Address, RequestId
from diptych.messages.membership import Member, Membership, Role
from diptych.messages.requests import LoadReport, Route, ServiceClass
from diptych.messages.steps import StepFeatures

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
        assert {each.route.prefill is None for each in explanation.predictions} == {path is not Path.SPLIT}
        if isinstance(explanation.decision, Route):
            assert (explanation.decision.prefill is None) == (path is not Path.SPLIT)

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

    @pytest.mark.parametrize(("decoding", "goes_to"), [(120, "d0"), (150, "d1")])
    def test_two_gpus_at_a_load_cost_twice_as_much_as_one(self, decoding, goes_to):
        one, two = load("d0", decoding=decoding), msgspec.structs.replace(load("d1", decoding=20), tp=2)
        assert policy().choose(REQUEST, view([], [two, one]), 0.0).decode == ref(goes_to)

    @given(st.lists(workers, min_size=1, max_size=3), st.lists(workers, max_size=3))
    def test_as_many_gpus_for_all_decide_alike(self, decode, prefill):
        named = {"p": prefill, "d": decode}
        pools = [[load(f"{role}{i}", waiting=w, decoding=d, free=f) for i, (w, d, f) in enumerate(of)] for role, of in named.items()]
        wide = [[msgspec.structs.replace(worker, tp=4) for worker in pool] for pool in pools]
        ours, theirs = (policy().decide(REQUEST, view(*of), 0.0) for of in (pools, wide))
        assert ours.decision == theirs.decision
        assert [4 * each.cost for each in ours.predictions] == pytest.approx([each.cost for each in theirs.predictions])

    @pytest.mark.parametrize(("plans_in_s", "num_steps"), [(0.014, 0.5), (0.005, 1.5)])
    @pytest.mark.parametrize("max_tokens", [200, 4])
    def test_what_is_handed_over_waits_for_the_step_under_way_and_the_one_planned_behind_it(self, plans_in_s, num_steps, max_tokens):
        """A short answer cannot make up for both."""
        decode = msgspec.structs.replace(load("d0", decoding=150), busy_s=0.014, plans_in_s=plans_in_s)
        asked = msgspec.structs.replace(REQUEST, max_new_tokens=max_tokens, path=Path.SPLIT)
        (moved,) = policy().explain(asked, view([load("p0")], [decode]), 0.0).predictions
        step_s = MODEL.decode_s(151, 151 * 1200)
        assert moved.tpot_s == pytest.approx(step_s * (1 + num_steps / (max_tokens - 1)), rel=0.03)
        assert moved.keeps_tpot is (moved.tpot_s < 0.02) is ((max_tokens, num_steps) != (4, 1.5))

    def test_nobody_waits_for_an_idle_worker(self):
        asked = msgspec.structs.replace(REQUEST, max_new_tokens=4)
        moved, local = policy().explain(asked, view([load("p0")], [load("d0")]), 0.0).predictions
        assert moved.tpot_s == pytest.approx(MODEL.decode_s(1, 1002))
        assert {moved.keeps_both, local.keeps_both} == {True}

    def test_the_length_that_is_expected_is_the_classs(self):
        cluster = msgspec.structs.replace(view([], [load("d0")]), mean_outputs={ServiceClass.DEFAULT: 30.0, ServiceClass.BATCH: 900.0})
        for service_class, expected in ((ServiceClass.DEFAULT, 30.0), (ServiceClass.BATCH, 900.0)):
            asked = msgspec.structs.replace(REQUEST, service_class=service_class)
            assert policy().explain(asked, cluster, 0.0).num_outputs == expected
        assert policy().explain(msgspec.structs.replace(REQUEST, max_new_tokens=7), cluster, 0.0).num_outputs == 7

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
        router = policy(seed=seed)
        explanation = router.decide(REQUEST, cluster, 0.0)
        by_itself = [each for each in explanation.predictions if each.route.decode == ref("p0")]
        if by_itself:
            assert explanation.decision == Route(decode=ref("p0"))
            assert by_itself[0].keeps_both
            assert free >= 19 + decoding
        assert not (by_itself and any(each.keeps_both for each in explanation.predictions if each not in by_itself))
        if isinstance(explanation.decision, Route):
            pool = "prefill" if explanation.decision.first == ref("p0") else "decode"
            assert [name for name, flow in router._flows.items() if flow.tokens_each] == [pool], "which computes the prompt"

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

    def test_who_was_promised_no_first_token_has_time_but_not_for_ever(self):
        request = msgspec.structs.replace(REQUEST, objectives=Objectives(None, 0.02), arrived_at=0.0)
        decision = policy().choose(request, self.full, 4.0)
        assert isinstance(decision, Queue)
        assert decision.useful_s == NO_OBJECTIVE_S - 4.0
        assert isinstance(policy().choose(request, self.full, NO_OBJECTIVE_S), Refuse)

    @pytest.mark.parametrize("ttft_s", [None, 0.4])
    def test_what_an_idle_worker_cannot_keep_is_refused_at_once(self, ttft_s):
        idle = view([load("p0")], [load("d0")])
        decision = policy().choose(msgspec.structs.replace(REQUEST, objectives=Objectives(ttft_s, 0.003)), idle, 0.0)
        assert isinstance(decision, Refuse)
        assert "5.05 ms even where nobody else is served; 3 ms were asked for" in decision.reason

    @pytest.mark.parametrize(
        ("worker", "reason"),
        [
            (load("d0", decoding=300, free=900), "keeps 20 ms a token; the best is 22.2 ms"),
            (load("d0", free=5), "has memory for it: 101% of the KV pool would be in use, and decodes there grow"),
            (load("d0", free=19, decoding=10), "has memory for it: 100% of the KV pool would be in use, and decodes there grow"),
            (load("d0", decoding=224, share=0.09), "has room to be sure of 20 ms a token; 19.7 ms are expected"),
        ],
    )
    def test_a_refusal_names_what_is_wanting(self, worker, reason):
        decision = policy().choose(REQUEST, view([], [worker]), 0.0)
        assert isinstance(decision, Queue)
        assert decision.reason == f"nobody in time {reason}"

    @pytest.mark.parametrize(("mean_outputs", "is_taken"), [(40.0, True), (1000.0, False)])
    def test_who_has_no_place_in_steps_in_time_is_refused(self, mean_outputs, is_taken):
        """Where answers are short, one comes free soon enough."""
        full = msgspec.structs.replace(load("d0", decoding=8), max_sequences=8)
        cluster = msgspec.structs.replace(view([], [full]), mean_outputs={ServiceClass.DEFAULT: mean_outputs})
        explanation = policy().decide(REQUEST, cluster, 0.0)
        assert isinstance(explanation.decision, Route if is_taken else Refuse)
        roomy = view([], [msgspec.structs.replace(full, max_sequences=9)])
        assert explanation.predictions[0].ttft_s > policy().decide(REQUEST, roomy, 0.0).predictions[0].ttft_s

    def test_what_is_handed_over_waits_for_a_place_with_its_first_token_told(self):
        full = msgspec.structs.replace(load("d0", decoding=8), max_sequences=8)
        taken, roomy = (
            policy().explain(msgspec.structs.replace(REQUEST, path=Path.SPLIT), view([load("p0")], [each]), 0.0).predictions[0]
            for each in (full, msgspec.structs.replace(full, max_sequences=9))
        )
        assert taken.ttft_s == roomy.ttft_s
        assert taken.kv_arrival_s > roomy.kv_arrival_s
        assert taken.tpot_s > roomy.tpot_s
        assert (taken.has_place, taken.keeps_tpot) == (False, False)
        assert (roomy.has_place, roomy.keeps_tpot) == (True, True)

    def test_a_first_token_that_is_overdue_is_said_to_be(self):
        late = msgspec.structs.replace(REQUEST, arrived_at=0.0)
        assert "was due 600 ms ago and is expected in" in policy().choose(late, self.full, 1.0).reason

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
        assert (seen.mean_outputs, seen.num_gateways) == (dict.fromkeys(ServiceClass, 100), 4)


def test_the_spec_names_it():
    router = make_policy("goodput", PolicyOptions(local_path=True, seed=3))
    assert router.choose(REQUEST, view([load("p0")], [load("d0")]), 0.0) == Route(decode=ref("d0"))


def test_without_reports_it_still_routes():
    strangers = ClusterView((), (WorkerLoad(ref("d0"), 0, 0, 1000, 1000, 64),))
    assert policy().choose(REQUEST, strangers, 0.0) == Route(decode=ref("d0"))
