"""What would happen on a worker, as predicted, against closed forms and against a worker told step by step."""

import math

import msgspec
import pytest
from harness.loads import MODEL, load
from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.router.estimate import NOTHING, DecodeEstimate, Inflow, Work, decode_side, estimate_decode, estimate_prefill, steps_of
from diptych.cluster.router.policy import WorkerLoad
from diptych.engine.pace import MIN_SHARE, beside_s, enough_rows
from diptych.messages.steps import StepFeatures, StepModel

FLAT = StepModel(5e-3, 7e-6, 0.0, 12e-6, 0.0, past_first_s=12e-6, past_second_s=4e-6)
BENT = StepModel(5e-3, 7e-6, 9e-10, 12e-6, 3.2e-8, error=0.02, num_observed=1000, past_first_s=12e-6, past_second_s=4e-6)
ENOUGH = round(enough_rows(FLAT, FLAT.base_s))


def decoded(worker: WorkerLoad, work: Work, joins_in_s: float, local_prefill_s: float, inflow: Inflow = NOTHING) -> DecodeEstimate:
    return estimate_decode(decode_side(worker, work, inflow), joins_in_s, local_prefill_s)


def tokens_within(model: StepModel, seconds: float, pairs_each: float, beside: float) -> float:
    """The inverse of `prefill_s`, by halves."""
    low, high = 0.0, 1e7
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if model.prefill_s(middle, middle * pairs_each, beside) <= seconds else (low, middle)
    return low


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


waiting_tokens, sequences = st.integers(0, 60_000), st.integers(0, 300)


coefficients = st.just(0.0) | st.floats(1e-9, 1e-2)
models = st.lists(coefficients, min_size=5, max_size=5).flatmap(
    lambda abcde: st.builds(lambda f, g: StepModel(*abcde, past_first_s=f, past_second_s=g), coefficients, coefficients)
)


class TestSteps:
    @given(models, sequences, sequences, st.floats(0, 4096), st.floats(0, 20_000), st.sampled_from((0.01, 0.05, math.inf)))
    def test_a_step_takes_what_the_model_says(self, model, decoding, joining, pairs_each, tokens, tpot_s):
        worker = msgspec.structs.replace(load("d0", decoding=decoding, model=model), num_requests=decoding + joining)
        steps = steps_of(worker, Work(1000, 200.0, 0.4, tpot_s), pairs_each, tokens)
        count = decoding + joining / 2 if decoding else 0
        assert steps.shared_s == pytest.approx(model.decode_s(count, 1200 * count))
        expected_s = steps.shared_s + model.prefill_s(tokens, tokens * pairs_each, count)
        assert steps.one_s(tokens) == pytest.approx(expected_s, rel=1e-9, abs=1e-12)

    @given(models, st.integers(1, 300), st.floats(0, 4096), st.floats(0, 0.5), st.sampled_from((0.01, 0.05)))
    def test_the_tokens_of_a_step_fill_the_time_for_them(self, model, decoding, pairs_each, lead_s, tpot_s):
        worker = msgspec.structs.replace(load("d0", decoding=decoding, model=model), max_step_tokens=10**6)
        steps = steps_of(worker, Work(1000, 200.0, 0.4, tpot_s), pairs_each, 0.0)
        tokens, seconds = steps.room(lead_s), steps.beside_s + lead_s
        takes_s = model.prefill_s(tokens, tokens * pairs_each, decoding)
        if 1 < tokens < 10**6 - decoding:
            assert takes_s == pytest.approx(seconds, rel=1e-6, abs=1e-9)
        else:
            assert tokens == 1 or takes_s <= seconds + 1e-9
            assert tokens > 1 or takes_s >= seconds - 1e-9


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
            count = min(left, 2048 - decoding, tokens_within(BENT, room_s + lead_s, 2000.5, decoding))
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
        lead_s=st.floats(-0.2, 0.05),
    )
    def test_a_worker_that_decodes_goes_on_after_its_report(self, decoding, tpot_s, waiting, own, left_share, age_s, is_ahead, lead_s):
        """Against the worker itself, told step by step: with nothing else to do it plans decodes alone, which get ahead of their pace and
        lend that to prompts, until one has ended and decodes. While they are behind, prompts get their least share."""
        message_s, decode_s, told_s = 1e-3, FLAT.decode_s(decoding, 0), lead_s
        enough = enough_rows(FLAT, decode_s) - decoding
        now, queue, came = -message_s - age_s, [float(waiting), 0.0], False
        first_s = left_share * decode_s
        ends = [now + first_s, now + first_s + decode_s] if is_ahead else [now + first_s]
        while sum(queue) > 1e-9 or not came:
            while len(ends) < 2 and (sum(queue) > 1e-9 or not came):
                room_s = max(beside_s(decode_s, tpot_s) + lead_s, decode_s / MIN_SHARE)
                most = max(1.0, min(2048 - decoding, tokens_within(FLAT, room_s, 0, decoding)))
                first = min(queue[0], most)
                count = min(sum(queue), max(first, min(most, enough)) if 0 < queue[0] == first else most)
                queue = [queue[0] - first, queue[1] - (count - first)]
                prompts_s = FLAT.prefill_s(count, 0, decoding)
                has_joined = 0 < count < 2048 - decoding or (first > 0 and queue[0] == 0)
                lead_s += beside_s(decode_s, tpot_s) - prompts_s
                lead_s = min(lead_s, 0.0) if has_joined else lead_s
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

    @given(models, sequences, sequences, st.floats(0, 0.9), st.floats(0, 2), st.sampled_from((0.01, 0.05)))
    def test_a_decode_step_takes_what_the_model_says(self, model, decoding, joining, share, joins_in_s, tpot_s):
        """With as many as there are when the request joins, and with the request."""
        worker = msgspec.structs.replace(load("d0", decoding=decoding, share=share, model=model), num_requests=decoding + joining)
        estimate = decoded(worker, Work(1000, 200.0, 0.4, tpot_s, mean_outputs=200.0), joins_in_s, 0.0)
        life_s = 200.0 * model.decode_s(decoding, 1200 * decoding)
        ended = decoding * min(1.0, joins_in_s / life_s) if life_s else decoding
        count, context_each = decoding + max(0.0, joining - ended), 1200 if decoding else 1100
        before_s, alone_s = (model.decode_s(count + more, count * context_each + more * 1100) for more in (0, 1))
        assert (estimate.before_s, estimate.after_s) == pytest.approx((before_s / (1 - share), alone_s / (1 - share)))
        assert estimate.alone_s == pytest.approx(alone_s)
        assert estimate.tpot_s == pytest.approx(min(alone_s + beside_s(alone_s, tpot_s), alone_s / (1 - share)))

    @given(st.integers(1, 300), st.integers(0, 50), st.integers(1, 300), st.integers(1, 100), st.floats(0, 0.9))
    def test_a_worker_whose_places_are_taken_is_waited_for_as_long_as_answers_take(self, places, waiting, decoding, more, share):
        worker = msgspec.structs.replace(load("d0", decoding=decoding, share=share), num_requests=decoding + waiting, max_sequences=places)
        work = Work(1000, 5.0, 0.4, mean_outputs=200.0)
        here, roomier, untold = (
            decode_side(msgspec.structs.replace(worker, max_sequences=each), work) for each in (places, places + more, 0)
        )
        num_before = decoding + waiting + 1 - places
        assert here.place_s == pytest.approx(max(0, num_before) * 200.0 * MODEL.decode_s(decoding, decoding * 1200) / (1 - share) / places)
        assert (here.place_spread_s > 0) is (here.place_s > 0) is (num_before > 0)
        assert roomier.place_s <= here.place_s
        assert (untold.place_s, untold.place_spread_s) == (0.0, 0.0)

    def test_by_the_join_some_have_ended(self):
        full = load("d0", decoding=200)
        now, later = (decoded(msgspec.structs.replace(full, num_requests=100), self.work, at_s, 0.0).tpot_s for at_s in (0.0, 1.0))
        assert later == now, "the load of a cluster that is in use is not believed to shrink"
        joined = msgspec.structs.replace(full, num_requests=260)
        assert decoded(joined, self.work, 1.0, 0.0).tpot_s < decoded(joined, self.work, 0.0, 0.0).tpot_s
