"""What rows want beside a draw: whose counts stay on the device and whose are brought, which rows are changed and which scored."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.engine.row_extras import NO_SLOT, CountSlots, changed_rows, scored_rows
from diptych.engine.row_extras import counted as counts_of
from diptych.engine.sampler import Sampled
from diptych.engine.scheduler import Chunk
from diptych.engine.sequence import PENDING, Sequence
from diptych.kernels.token_counts import IN_PROMPT, MOST_COUNTED
from diptych.messages.ids import Address, Epoch, RequestId, WorkerId
from diptych.messages.requests import GenerateRequest, Route, SamplingParams, WorkerRef

VOCAB, NUM_SLOTS = 11, 4
HERE = Route(WorkerRef(WorkerId("w"), Epoch(1), Address("")))


def sequence(tokens: list[int], num_outputs: int = 0, **options: Any) -> Sequence:
    sampling = SamplingParams(max_tokens=50, seed=0, **options)
    request = GenerateRequest(RequestId("r"), Address(""), tuple(tokens), sampling, HERE, math.inf, num_prior_outputs=num_outputs)
    return Sequence(request, 0, math.inf, math.inf, hands_off=False, max_len=100)


def counted(tokens: list[int], num_prompt: int) -> list[int]:
    """What the table is to hold for a sequence."""
    times = Counter(tokens[num_prompt:])
    return [times[token] + (IN_PROMPT if token in tokens[:num_prompt] else 0) for token in range(VOCAB)]


class Table:
    """As the device has it; sampled tokens are counted as a step ends."""

    def __init__(self) -> None:
        self.rows = np.full((NUM_SLOTS, VOCAB), 77, dtype=np.int16)
        self.slots = CountSlots(NUM_SLOTS)

    def step(self, sequences: list[Sequence]) -> None:
        slots, fresh = self.slots.assign(sequences)
        assert len(set(slots)) == len(slots)
        if fresh:
            brought = counts_of(fresh, VOCAB)
            self.rows[brought.slots] = 0
            self.rows.reshape(-1)[brought.places] = brought.counts
        for each, slot in zip(sequences, slots, strict=True):
            known = [each.newest if token == PENDING else token for token in each.token_ids]
            assert self.rows[slot].tolist() == counted(known, each.num_prompt_tokens)
            self.rows[slot, each.next] += 1


class Running(Sequence):
    """Whose tokens the host learns one step late: `newest` is what a PENDING one will be, `next` what this step samples."""

    newest = next = 0


@settings(max_examples=200)
@given(st.data(), st.integers(1, 12))
def test_counts_are_those_of_the_tokens_whoever_comes_and_goes(data: st.DataObject, num_steps: int) -> None:
    """A sequence is left out of a step (preempted) only when the host knows its tokens, as the engine has it."""
    table = Table()
    everybody = [
        Running(sequence(tokens, presence_penalty=1.0).request, 0, math.inf, math.inf, hands_off=False, max_len=100)
        for tokens in data.draw(st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6), min_size=1, max_size=6))
    ]
    for _ in range(num_steps):
        chosen = data.draw(st.lists(st.sampled_from(everybody), max_size=NUM_SLOTS, unique_by=id))
        for each in everybody:
            if each.is_pending and (each not in chosen or data.draw(st.booleans())):
                each.token_ids[-1] = each.newest
        for each in chosen:
            each.next = data.draw(st.integers(0, VOCAB - 1))
        table.step(list(chosen))
        for each in chosen:
            if each.is_pending:
                each.token_ids[-1] = each.newest
            each.newest = each.next
            each.token_ids.append(PENDING)


def test_a_sequence_that_was_not_in_the_step_before_is_counted_anew() -> None:
    slots, one = CountSlots(NUM_SLOTS), sequence([1, 2], frequency_penalty=1.0)
    assert slots.assign([one]) == ([0], {one: 0})
    one.token_ids.append(5)
    assert slots.assign([one]) == ([0], {})
    one.token_ids.append(6)
    slots.assign([])
    fresh = counts_of(slots.assign([one])[1], VOCAB)
    assert fresh.places.tolist() == [1, 2, 5, 6]
    assert fresh.counts.tolist() == [IN_PROMPT, IN_PROMPT, 1, 1]


def test_a_count_is_never_more_than_the_table_can_hold() -> None:
    one = sequence([3] + [4] * 40_000, num_outputs=40_000, frequency_penalty=1.0)
    fresh = counts_of({one: 0}, VOCAB)
    assert fresh.counts.tolist() == [IN_PROMPT, MOST_COUNTED]


def test_only_rows_that_want_it_are_changed_and_only_penalised_ones_have_a_slot() -> None:
    plain, scored = sequence([1]), sequence([1], logprobs=3)
    biased = sequence([1], logit_bias={7: 2.0, 3: -1.0})
    penalised = sequence([1], repetition_penalty=1.5, frequency_penalty=0.25)
    masked = sequence([1], min_tokens=1, stop_token_ids=(2, 3), logit_bias={3: 9.0})
    changed, fresh = changed_rows([plain, biased, scored, penalised, masked], CountSlots(NUM_SLOTS))
    assert changed is not None
    assert list(fresh) == [penalised]
    assert changed.sequences == (biased, penalised, masked)
    assert changed.rows.tolist() == [1, 3, 4]
    assert changed.slots.tolist() == [NO_SLOT, fresh[penalised], NO_SLOT]
    assert changed.penalties.tolist() == [[1.0, 1.5, 1.0], [0.0, 0.0, 0.0], [0.0, 0.25, 0.0]]
    assert changed.bias_starts.tolist() == [0, 2, 2, 4]
    biases = zip(changed.bias_ids.tolist(), changed.biases.tolist(), strict=True)
    assert list(biases) == [(7, 2.0), (3, -1.0), (3, -math.inf), (2, -math.inf)]


def test_stop_tokens_are_masked_until_enough_tokens_are_out() -> None:
    one, slots = sequence([1, 4], num_outputs=1, min_tokens=2, stop_token_ids=(2,)), CountSlots(NUM_SLOTS)
    assert changed_rows([one], slots)[0] is not None
    one.token_ids.append(PENDING)
    assert changed_rows([one], slots) == (None, {})


def test_scores_find_their_way_back_to_their_chunks() -> None:
    prompt = sequence([1, 2, 3, 4], prompt_logprobs=1, logprobs=2)
    half, plain, scored = sequence([5, 6, 7], prompt_logprobs=0), sequence([8]), sequence([9], logprobs=0)
    chunks = [Chunk(plain, 0, 1), Chunk(prompt, 0, 4), Chunk(half, 0, 2), Chunk(scored, 0, 1)]
    rows = scored_rows(chunks, VOCAB)
    assert rows is not None
    assert rows.rows.tolist() == [1, 2, 3, 4, 5, 6, 7]          # of plain's 1 row of logits, prompt's 4, half's 2 and scored's 1
    assert rows.tokens.tolist() == [2, 3, 4, -2, 6, 7, -3]      # the second and the third that are sampled
    assert rows.num_top.tolist() == [1, 1, 1, 2, 0, 0, 0]
    logprobs = np.arange(7, dtype=np.float32)[:, None] * -10 - np.arange(3, dtype=np.float32)
    ids = np.arange(14, dtype=np.int32).reshape(7, 2)
    assert list(rows.of_chunks(logprobs, ids, [0, 5, 10])) == [
        ((), None),
        (
            (Sampled(2, 0.0, ((0, -1.0),)), Sampled(3, -10.0, ((2, -11.0),)), Sampled(4, -20.0, ((4, -21.0),))),
            Sampled(5, -30.0, ((6, -31.0), (7, -32.0))),
        ),
        ((Sampled(6, -40.0), Sampled(7, -50.0)), None),
        ((), Sampled(10, -60.0)),
    ]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.3, "top_k": 4}, {"min_tokens": 3}, {"stop_token_ids": (2,)}])
def test_nothing_is_made_for_a_step_of_plain_rows(options: dict[str, Any]) -> None:
    chunks = [Chunk(sequence([1, 2], **options), 0, 2)]
    assert changed_rows([chunk.sequence for chunk in chunks], CountSlots(NUM_SLOTS)) == (None, {})
    assert scored_rows(chunks, VOCAB) is None
