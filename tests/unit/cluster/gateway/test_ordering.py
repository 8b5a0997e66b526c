import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.gateway.ordering import MAX_GAP_DELTAS, InOrder
from diptych.messages.errors import Malformed
from diptych.messages.ids import RequestId
from diptych.messages.requests import FinishReason, TokenDelta, TokenLogprobs

R = RequestId("r")


def delta(index: int, *token_ids: int, finish: FinishReason | None = None) -> TokenDelta:
    return TokenDelta(R, index, token_ids, finish, logprobs=tuple(TokenLogprobs(token_id, -1.0) for token_id in token_ids))


def tokens(deltas: list[TokenDelta]) -> list[int]:
    return [token_id for each in deltas for token_id in each.token_ids]


def test_token_1_may_overtake_token_0():
    order = InOrder(0)
    assert order.push(delta(1, 11)) == []
    assert order.push(delta(0, 10)) == [delta(0, 10), delta(1, 11)]


def test_repeats_are_dropped_and_overlaps_cut():
    order = InOrder(0)
    assert tokens(order.push(delta(0, 10, 11))) == [10, 11]
    assert order.push(delta(0, 10, 11)) == []
    assert order.push(delta(1, 11)) == []
    assert order.push(delta(1, 11, 12)) == [delta(2, 12)]


def test_a_cut_delta_does_not_bring_its_opening_again():
    order = InOrder(0)
    opening = TokenDelta(R, 0, (10,), num_cached_tokens=5, prompt_logprobs=(TokenLogprobs(1, -1.0),))
    assert order.push(opening) == [opening]
    [rest] = order.push(TokenDelta(R, 0, (10, 11), num_cached_tokens=5, prompt_logprobs=(TokenLogprobs(1, -1.0),)))
    assert (rest.num_cached_tokens, rest.prompt_logprobs) == (0, ())


def test_nothing_comes_after_the_end():
    order = InOrder(3)
    assert tokens(order.push(delta(3, 10, finish=FinishReason.STOP))) == [10]
    assert order.push(delta(4, 11)) == []
    assert order.push(delta(3, 10, finish=FinishReason.STOP)) == []


def test_an_end_without_a_token_comes_through():
    end = TokenDelta(R, 0, (), FinishReason.LENGTH)
    order = InOrder(0)
    assert order.push(end) == [end]
    assert order.push(end) == []


def test_a_gap_that_does_not_close_is_an_error():
    order = InOrder(0)
    for index in range(1, MAX_GAP_DELTAS + 1):
        assert order.push(delta(index, 10)) == []
    with pytest.raises(Malformed, match="token 0 is missing"):
        order.push(delta(MAX_GAP_DELTAS + 1, 10))


@given(st.data(), st.integers(1, 20), st.integers(0, 5))
def test_any_delivery_gives_each_token_once_in_order(data, num_tokens, start):
    """Cut into overlapping deltas in any way, delivered in any order, any number of times."""
    spans = [(i, i + 1) for i in range(num_tokens)]
    span = st.tuples(st.integers(0, num_tokens - 1), st.integers(1, num_tokens)).filter(lambda s: s[0] < s[1])
    spans += data.draw(st.lists(span, max_size=10))
    order, out = InOrder(start), []
    for low, high in data.draw(st.permutations(spans)):
        finish = FinishReason.LENGTH if high == num_tokens else None
        ready = order.push(delta(start + low, *range(100 + low, 100 + high), finish=finish))
        assert all(each.index == start + len(out) + sum(len(e.token_ids) for e in ready[:i]) for i, each in enumerate(ready))
        assert all([e.token_id for e in each.logprobs] == list(each.token_ids) for each in ready)
        assert [each.finish for each in ready[:-1]] == [None] * (len(ready) - 1)
        out += tokens(ready)
    assert out == list(range(100, 100 + num_tokens))
    assert order.next_index == start + num_tokens
