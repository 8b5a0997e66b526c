"""Chunks beside decodes: what is in the step keeps the tightest promise, and no promise stops prompts altogether."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from diptych.engine.pace import (
    AIM,
    CAUGHT_UP,
    CUT_SHARE,
    MEMORY,
    MIN_SHARE,
    SHORT_SHARE,
    SPARE_SHARE,
    Pacer,
    StepRoom,
    affordable_tokens,
    beside_s,
    enough_rows,
)
from diptych.engine.sequence import Sequence
from diptych.messages.ids import Address, Epoch, RequestId, WorkerId
from diptych.messages.requests import GenerateRequest, Route, SamplingParams, WorkerRef
from diptych.messages.steps import StepFeatures, StepModel, attended_pairs

MODEL = StepModel(5e-3, 7e-6, 9e-10, 12e-6, 3.2e-8, past_first_s=12e-6, past_second_s=4e-6)
HERE = Route(WorkerRef(WorkerId("decode-0"), Epoch(1), Address("fake://d")))
seconds, tokens = st.floats(-0.05, 0.5), st.integers(0, 8192)
cost = st.floats(0, 1e-2)
models = st.builds(StepModel, cost, cost, cost, cost, cost, past_first_s=cost, past_second_s=cost)


def decode(tpot: float | None, num_outputs: int = 1, context: int = 1000) -> Sequence:
    sampling = SamplingParams(max_tokens=4096, seed=0)
    request = GenerateRequest(RequestId("r"), Address("fake://g"), (1,) * context, sampling, HERE, timeout_s=1.0, tpot_slo_s=tpot)
    sequence = Sequence(request, 0, 1.0, math.inf, hands_off=False, max_len=1 << 20, num_computed=context + num_outputs - 1)
    sequence.token_ids += [0] * num_outputs
    return sequence


@given(models, tokens, seconds, tokens, st.integers(0, 600))
def test_the_largest_count_that_fits(model, start, left_s, most, rows):
    count = affordable_tokens(model, start, left_s, most, rows)
    assert 0 <= count <= most
    assert count == 0 or model.prefill_s(count, attended_pairs(start, count), rows) <= left_s
    assert count == most or model.prefill_s(count + 1, attended_pairs(start, count + 1), rows) > left_s


@given(tokens, seconds, seconds, st.integers(1, 4096))
def test_more_time_is_never_less_room(start, one, other, budget):
    few, many = (StepRoom(budget, left_s, budget // MIN_SHARE, MODEL).take(start, 10**6) for left_s in sorted((one, other)))
    assert few <= many


@given(st.lists(st.tuples(tokens, st.integers(1, 5000)), max_size=8), seconds, st.integers(1, 4096), st.integers(0, 512))
def test_prompts_share_one_room(prompts, left_s, budget, floor):
    room, taken, cost_s = StepRoom(budget, left_s, min(floor, budget), MODEL), 0, 0.0
    for start, wanted in prompts:
        if room.is_empty:
            break
        count = room.take(start, wanted)
        assert 1 <= count <= wanted
        taken, cost_s = taken + count, cost_s + MODEL.prefill_s(count, attended_pairs(start, count), taken)
    assert taken <= budget
    one_s = MODEL.prefill_s(1, 8192, 4096)   # a prompt that was let in gets one token
    assert taken <= floor + 1 or cost_s <= left_s + one_s


boundaries = st.lists(st.integers(1, 600), unique=True, max_size=6).map(sorted)


parts = st.lists(st.tuples(tokens, st.integers(1, 800)), min_size=1, max_size=6)


@given(parts, seconds, st.integers(1, 900), st.integers(0, 300), boundaries)
def test_a_prompt_that_is_cut_leaves_no_row_to_padding(prompts, left_s, budget, rows, padded):
    """A step goes up to a number of rows that it would be padded to anyway, or down to the last one before, whichever is nearer."""
    room, taken = StepRoom(budget, left_s, 1, MODEL, rows, padded), 0
    for start, wanted in prompts:
        if room.is_empty:
            break
        before, most = room.rows, min(wanted, room.tokens)
        plain = min(most, max(1, room.floor, affordable_tokens(MODEL, start, room.seconds, room.tokens, before)))
        count = room.take(start, wanted)
        taken += count
        assert 1 <= count <= most
        assert room.rows == rows + taken
        assert room.free == min((each for each in padded if each >= room.rows), default=room.rows) - room.rows
        if count not in (most, plain):
            assert room.free == 0
        if plain < most and padded and padded[-1] >= before + plain:
            assert room.rows in padded or count == most
            assert abs(count - plain) <= min(abs(each - before - plain) for each in padded if each > before)
    assert taken <= budget


@given(st.integers(0, 200_000), st.floats(1e-3, 2e-2), st.integers(1, 300), boundaries, st.integers(1, 3))
def test_tokens_that_fill_a_step_cost_little_more_attention(start, room_s, rows, padded, prompts):
    """Their rows are free. What they attend to is not: far into a long prompt they would break promises step by step."""
    room, spent_s = StepRoom(4096, room_s, 1, MODEL, rows, padded, spare_s=room_s / SPARE_SHARE), 0.0
    for _ in range(prompts):
        if room.is_empty:
            break
        plain = max(1, affordable_tokens(MODEL, start, room.seconds, room.tokens, room.rows))
        count = room.take(start, 4096)
        extra = attended_pairs(start, max(count, plain)) - attended_pairs(start, plain)
        spent_s += MODEL.prefill_pair_s * extra
    assert spent_s <= room_s / SPARE_SHARE + 1e-9
    assert room.spare_s >= -1e-12


def test_what_a_step_is_padded_to_is_given_to_the_next_prompt():
    room = StepRoom(2048, MODEL.prefill_s(70, attended_pairs(0, 70), 100), 0, MODEL, 100, [128, 256, 384])
    assert room.take(0, 70) == 70
    assert (room.free, room.is_empty) == (86, False)
    assert room.take(4000, 500) == 86
    assert room.is_empty


def test_a_prompt_that_is_cut_is_not_overtaken():
    """What it lost because the step went down to what it is padded to would be padded up again for the next one."""
    room = StepRoom(2048, MODEL.prefill_s(150, attended_pairs(0, 150), 0), 1, MODEL, 0, [128, 256])
    assert room.take(0, 1000) == 128
    assert room.seconds > MODEL.prefill_s(1, 1, 128)
    assert room.is_empty


@given(models, st.integers(0, 4000), st.integers(0, 4000))
def test_two_steps_of_enough_rows_take_little_more_than_one(model, more, other):
    enough = enough_rows(model, model.base_s)
    assume(enough < 1e6)
    one, other = (StepFeatures(math.ceil(enough) + rows) for rows in (more, other))
    one_s, other_s, both_s = (model.step_s(each) for each in (one, other, one.plus(other)))
    assert one_s + other_s - both_s <= one_s / CUT_SHARE + 1e-6 * both_s + 1e-12


@given(st.lists(st.tuples(tokens, st.integers(1, 3000)), min_size=1, max_size=6), st.integers(1, 2048), boundaries)
def test_a_step_in_which_a_prompt_ends_takes_no_more_than_enough(prompts, enough, padded):
    room, ended = StepRoom(2048, padded=padded, enough=enough), False
    for start, wanted in prompts:
        if room.is_empty:
            break
        before = room.rows
        count = room.take(start, wanted)
        assert count == min(wanted, 2048 - before) or ended
        assert room.rows <= min((each for each in padded if each >= max(before, enough)), default=max(before, enough)) or not ended
        ended = ended or count == wanted


def test_prompts_are_computed_one_after_the_other_where_that_costs_little():
    """Two of 1000 tokens in one step would both end when it does."""
    room = Pacer(lambda: 7.0, lambda: MODEL, padded=[256, 512, 1024]).room([], 2048)
    assert [room.take(0, 1000), room.take(0, 1000)] == [1000, 24]
    assert room.is_empty
    room = Pacer(lambda: 7.0, lambda: MODEL).room([], 2048)
    assert [room.take(0, 100), room.take(0, 100), room.take(0, 1000)] == [100, 100, round(enough_rows(MODEL, MODEL.base_s)) - 200]


def test_what_a_step_leaves_of_its_room_is_lent_to_the_next_one_until_somebody_joins():
    pacer, sequence = Pacer(lambda: 7.0, lambda: MODEL), decode(0.02)
    room = pacer.room([sequence], 2048)
    pacer.planned(room)
    assert pacer.lead_s == pytest.approx(beside_s(MODEL.decode_s(1, len(sequence.token_ids)), 0.02))
    count = room.take(0, 300)
    pacer.planned(room)
    assert pacer.lead_s == pytest.approx(AIM * 0.02 - MODEL.step_s(StepFeatures(count, attended_pairs(0, count), 1, 1001)))
    pacer.joined()
    assert pacer.lead_s == 0.0


def test_a_late_decode_is_told_to_be_behind_though_prompts_get_their_least():
    now, sequence = [7.0], decode(0.02)
    pacer = Pacer(lambda: now[0], lambda: MODEL)
    pacer.room([sequence], 2048)
    now[0] += 0.1
    room = pacer.room([sequence], 2048)
    assert room.seconds > 0
    pacer.planned(room)
    assert pacer.lead_s == pytest.approx(AIM * 0.02 - 0.1 - MODEL.decode_s(1, len(sequence.token_ids)))
    behind_s = pacer.lead_s
    pacer.joined()
    assert pacer.lead_s == behind_s, "who joins brings nobody forward"


@given(st.integers(1, 150), st.integers(1, 400), boundaries)
def test_prompts_get_their_least_share_whatever_steps_are_padded_to(num_decodes, context, padded):
    """Of late decodes' steps: what one step has less, the next ones have more."""
    now, decodes = [7.0], [decode(0.005, context=context) for _ in range(num_decodes)]
    pacer, spent_s, num_steps = Pacer(lambda: now[0], lambda: MODEL, padded=padded), 0.0, 60
    pacer.room(decodes, 2048)
    now[0] += 10.0
    for _ in range(num_steps):
        room = pacer.room(decodes, 2048)
        count = room.take(0, 10**6)
        spent_s += MODEL.prefill_s(count, attended_pairs(0, count), num_decodes)
        pacer.planned(room)
    least_s = MODEL.decode_s(num_decodes, sum(len(each.token_ids) for each in decodes)) / MIN_SHARE
    assert spent_s >= (num_steps - 2) * least_s - num_steps * MODEL.prefill_s(1, 1, 1000)


def test_what_a_prompt_did_not_want_is_not_owed_to_the_next():
    now, sequence = [7.0], decode(0.005)
    pacer = Pacer(lambda: now[0], lambda: MODEL, padded=[64, 128])
    pacer.room([sequence], 2048)
    now[0] += 10.0
    rooms = []
    for _ in range(2):
        rooms.append(pacer.room([sequence], 2048))
        rooms[-1].take(0, 2)
        pacer.planned(rooms[-1])
    assert rooms[0].seconds == rooms[1].seconds > 0


def test_nobody_who_was_promised_no_pace_lends():
    pacer = Pacer(lambda: 7.0, lambda: MODEL)
    pacer.planned(StepRoom(2048))
    assert pacer.lead_s == 0.0


@given(st.lists(st.sampled_from([0.012, 0.02, 0.05, None]), min_size=1, max_size=60), st.integers(1, 4096))
def test_a_step_that_has_room_ends_before_the_tightest_decode_is_due(tpots, budget):
    decodes = [decode(tpot) for tpot in tpots]
    room = Pacer(lambda: 7.0, lambda: MODEL).room(decodes, budget)
    count = room.take(0, 10**6)
    decode_s = MODEL.decode_s(len(decodes), sum(len(each.token_ids) for each in decodes))
    known = [tpot for tpot in tpots if tpot is not None]
    prefill_s = MODEL.prefill_s(count, attended_pairs(0, count), len(decodes))
    assert count == 1 or not known or prefill_s <= beside_s(decode_s, min(known)) + 1e-9
    assert known or count == budget


@given(st.floats(1e-3, 0.1), st.floats(1e-3, 0.1))
def test_prompts_get_what_the_promise_leaves_and_never_nothing(decode_s, tpot_s):
    step_s = decode_s + beside_s(decode_s, tpot_s)
    assert step_s == pytest.approx(max(AIM * tpot_s, decode_s * (1 + 1 / MIN_SHARE)))


def test_slack_that_was_gained_is_lent_and_lateness_is_not_for_ever():
    now, sequence = [0.0], decode(0.02)
    pacer = Pacer(lambda: now[0], lambda: MODEL)
    at_first = pacer.room([sequence], 4096).take(0, 10**6)
    sequence.token_ids += [0] * 10
    now[0] = 10 * 0.006
    assert pacer.room([sequence], 4096).take(0, 10**6) > 3 * at_first
    now[0] = 10.0
    late_s = MODEL.decode_s(1, len(sequence.token_ids)) / MIN_SHARE
    assert pacer.room([sequence], 4096).take(0, 10**6) == affordable_tokens(MODEL, 0, late_s, 4096, 1)
    assert pacer.room([decode(None)], 4096).take(0, 10**6) == 4096


@pytest.mark.parametrize("floor", [0, 3])
def test_a_room_without_time_is_empty_but_for_its_floor(floor):
    assert StepRoom(8, -1.0, floor, MODEL).is_empty == (floor == 0)


@given(st.lists(st.integers(1, 60), max_size=150), st.floats(0, 0.1))
def test_where_answers_are_short_a_handover_s_wait_is_made_up_for_at_once(lengths, waited_s):
    pacer = Pacer(lambda: 7.0, lambda: MODEL)
    for length in lengths:
        pacer.answered(length)
    recent = sorted([length for length in lengths if length > 1][-MEMORY:])
    are_short = bool(recent) and recent[len(recent) // SHORT_SHARE] < CAUGHT_UP
    here, handed_over = decode(0.02), decode(0.02)
    handed_over.handed_over_at = 7.0 - waited_s
    before_s, after_s = (pacer.room([sequence], 4096).seconds for sequence in (here, handed_over))
    decode_s = MODEL.decode_s(1, len(here.token_ids))
    assert before_s == pytest.approx(beside_s(decode_s, 0.02))
    assert after_s == pytest.approx(max(AIM * 0.02 - waited_s - decode_s, decode_s / MIN_SHARE) if are_short else before_s)


def test_an_answer_of_so_many_tokens_has_made_up_for_two_steps():
    assert (CAUGHT_UP - 1) * (1 - AIM) < 2 * AIM <= CAUGHT_UP * (1 - AIM) + 1e-9


@given(st.floats(0.008, 0.1), st.floats(0, 0.1))
def test_with_steps_planned_one_ahead_every_token_is_in_time(tpot, first_s):
    """However many prompt tokens are there, and however long the step takes that is under way at first."""
    now, ends, sequence = [0.0], [first_s], decode(tpot)
    pacer = Pacer(lambda: now[0], lambda: MODEL, lambda at: ends[-1] - at)
    one_s = MODEL.prefill_s(1, 1, 1)
    for number in range(1, 40):
        count = pacer.room([sequence], 10**6).take(0, 10**6)
        ends.append(ends[-1] + MODEL.decode_s(1, len(sequence.token_ids)) + MODEL.prefill_s(count, attended_pairs(0, count), 1))
        assert ends[-1] <= first_s + AIM * tpot * number + one_s
        assert ends[-1] >= first_s + AIM * tpot * number - 2 * MODEL.prefill_s(1, 10**5, 10**5), "prompts got less than there was"
        sequence.token_ids.append(0)
        now[0] = ends[-2]
