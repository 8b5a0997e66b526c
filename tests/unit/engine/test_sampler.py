"""The sampler: each filter's set, each penalty's number, the drawn distribution, and that a draw depends on its own request alone."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diptych.engine.sampler import Sampled, SamplingRow, sample, score, uniform
from diptych.messages.requests import SamplingParams

torch.set_num_threads(1)

LADDER = torch.tensor([0.40, 0.05, 0.25, 0.20, 0.10]).log()     # by likelihood: 0, 2, 3, 4, 1


def row(*, prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), **params: Any) -> SamplingRow:
    return SamplingRow(SamplingParams(**{"max_tokens": 100, "seed": 0} | params), prompt, output)


def sample_one(logits: Tensor, sampling_row: SamplingRow) -> Sampled:
    return sample(logits[None], [sampling_row])[0]


def greedy(logits: Tensor, **options: Any) -> int:
    return sample_one(logits, row(temperature=0.0, **options)).token_id


def drawn(logits: Tensor, num_draws: int = 400, **options: Any) -> Counter[int]:
    rows = [row(seed=seed, **options) for seed in range(num_draws)]
    return Counter(sampled.token_id for sampled in sample(logits.expand(num_draws, -1), rows))


# The draw

def test_distribution_is_the_softmax() -> None:
    """χ² with 4 degrees of freedom stays under its 99.9 % quantile, over seeds and over output indices of one seed."""
    expected, num_draws, quantile = LADDER.exp().tolist(), 4000, 18.47
    by_index = [row(seed=5, output=(0,) * index) for index in range(num_draws)]
    for counts in (drawn(LADDER, num_draws), Counter(s.token_id for s in sample(LADDER.expand(num_draws, -1), by_index))):
        assert sum((counts[i] - num_draws * p) ** 2 / (num_draws * p) for i, p in enumerate(expected)) < quantile


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_sharpens_and_flattens(temperature: float) -> None:
    counts, num_draws = drawn(LADDER, 4000, temperature=temperature), 4000
    expected = torch.softmax(LADDER / temperature, 0).tolist()
    assert all(abs(counts[i] / num_draws - p) < 4 * math.sqrt(p * (1 - p) / num_draws) for i, p in enumerate(expected))


def test_a_vanishing_temperature_is_greedy_without_overflow() -> None:
    assert drawn(LADDER * 1000, 50, temperature=1e-300) == Counter({0: 50})


def test_uniform_is_uniform_and_pinned() -> None:
    values = [uniform(seed, index) for seed in range(100) for index in range(100)]
    assert all(0 <= value < 1 for value in values)
    assert len(set(values)) == len(values)
    counts = Counter(int(value * 10) for value in values)
    assert sum((counts[i] - 1000) ** 2 / 1000 for i in range(10)) < 27.88       # χ², 9 degrees of freedom, 99.9 %
    assert uniform(1, 2) == uniform(1 + 2**64, 2)      # seeds count modulo 2^64
    assert uniform(1, 2) != uniform(2, 1)


def test_a_released_stream_never_changes() -> None:
    """Workers of different versions may continue each other's streams."""
    values = [uniform(seed, index).hex() for seed, index in ((0, 0), (0, 1), (7, 0), (2**63 - 1, 99))]
    assert values == ["0x1.4e0dba5e9a32fp-1", "0x1.54c7a80d79bf4p-3", "0x1.7169852efd579p-1", "0x1.2307b7174e163p-1"]


@settings(max_examples=30)
@given(st.permutations(range(6)), st.integers(0, 2**63 - 1))
def test_batch_mates_do_not_change_a_draw(order: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 1000)
    logits = torch.randn(6, 50, generator=generator) * 3
    variety: list[dict[str, Any]]
    variety = [{}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 0.0}, {"min_p": 0.1}, {"repetition_penalty": 1.4}]
    rows = [row(seed=seed + i, prompt=(1, 2), output=(3,) * i, logprobs=2, **options) for i, options in enumerate(variety)]
    together = sample(logits[order], [rows[i] for i in order])
    assert together == [sample_one(logits[i], rows[i]) for i in order]


def test_the_same_request_continues_the_same_stream_anywhere() -> None:
    """Prompt and outputs are all the state: which tokens an earlier worker made does not matter, only that they are there."""
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(3))
    outputs: list[int] = []
    for step in logits:
        outputs.append(sample_one(step, row(seed=11, output=tuple(outputs), top_p=0.9)).token_id)
    resumed = [sample_one(logits[i], row(seed=11, output=tuple(outputs[:i]), top_p=0.9)).token_id for i in range(10, 20)]
    assert resumed == outputs[10:]
    assert len(set(outputs)) > 5


# Filters

@pytest.mark.parametrize(
    ("options", "survivors"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 2, 3}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.39}, {0}),
        ({"top_p": 0.41}, {0, 2}),
        ({"top_p": 0.86}, {0, 2, 3, 4}),
        ({"top_p": 0.0}, {0}),
        ({"min_p": 0.45}, {0, 2, 3}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "top_p": 0.75}, {0, 2}),       # of 0.85 after top_k, 0.65 is 76 %
        ({"top_k": 2, "min_p": 0.9}, {0}),
        ({"temperature": 2.0, "min_p": 0.45}, {0, 2, 3, 4}),     # filters come after temperature: the square root of 0.25 is 0.5
    ],
)
def test_filters_keep_exactly(options: dict[str, Any], survivors: set[int]) -> None:
    assert set(drawn(LADDER, 600, **options)) == survivors


def test_ties_at_the_edge_of_top_k_go_to_the_lower_id() -> None:
    assert set(drawn(torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]), top_k=2)) == {1, 2}


def test_ties_at_the_edge_of_top_p_go_to_the_lower_id() -> None:
    assert set(drawn(torch.zeros(10), top_p=0.35)) == {0, 1, 2, 3}


@settings(max_examples=60)
@given(
    st.lists(st.floats(-20, 20), min_size=2, max_size=40),
    st.integers(0, 45),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.floats(0.1, 5),
    st.integers(0),
)
def test_a_draw_satisfies_every_filter(raw: list[float], top_k: int, top_p: float, min_p: float, temperature: float, seed: int) -> None:
    logits = torch.tensor(raw)
    token_id = sample_one(logits, row(seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)).token_id
    weights = torch.softmax(logits.double() / temperature, 0)
    likelier = weights[weights > weights[token_id]]
    assert len(likelier) < (top_k or len(raw))
    assert likelier.sum() <= top_p + 1e-9
    assert weights[token_id] >= min_p * weights.max() * (1 - 1e-9)


# Greedy and penalties

def test_greedy_takes_the_lowest_of_equals() -> None:
    assert greedy(torch.tensor([0.0, 3.0, 3.0])) == 1


def test_repetition_penalty_divides_positive_and_multiplies_negative_of_prompt_and_output() -> None:
    logits = torch.tensor([4.0, 3.0, 2.5])
    assert greedy(logits, prompt=(0,), repetition_penalty=1.3) == 0      # 3.08 over 3
    assert greedy(logits, prompt=(0,), repetition_penalty=1.4) == 1      # 2.86
    assert greedy(logits, prompt=(0,), output=(1, 1), repetition_penalty=1.7) == 2
    assert greedy(torch.tensor([-1.0, -1.5]), output=(0,), repetition_penalty=2.0) == 1


def test_presence_penalty_counts_once_and_frequency_each_time_over_the_output_only() -> None:
    logits = torch.tensor([2.0, 1.0])
    assert greedy(logits, output=(0, 0, 0), presence_penalty=0.9) == 0
    assert greedy(logits, output=(0,), presence_penalty=1.1) == 1
    assert greedy(logits, output=(0, 0), frequency_penalty=0.4) == 0
    assert greedy(logits, output=(0, 0, 0), frequency_penalty=0.4) == 1
    assert greedy(logits, prompt=(0, 0, 0), presence_penalty=2.0, frequency_penalty=2.0) == 0


def test_logit_bias_comes_before_the_penalties() -> None:
    logits = torch.tensor([1.0, 3.0])
    assert greedy(logits, logit_bias={0: 5.0}) == 0
    assert greedy(logits, logit_bias={0: 5.0}, prompt=(0,), repetition_penalty=2.5) == 1      # (1 + 5) / 2.5 < 3 < 1 / 2.5 + 5
    assert set(drawn(LADDER, logit_bias={0: -100.0, 2: -100.0})) == {1, 3, 4}


def test_min_tokens_masks_stop_tokens_until_enough_are_out() -> None:
    logits = torch.tensor([5.0, 4.0, 1.0])
    options: dict[str, Any] = {"min_tokens": 2, "stop_token_ids": (0, 1)}
    assert [greedy(logits, output=(2,) * n, **options) for n in range(4)] == [2, 2, 0, 0]
    assert set(drawn(logits, output=(2,), **options)) == {2}


def test_rows_without_changes_are_not_touched_by_those_with() -> None:
    logits = torch.tensor([[2.0, 1.0], [2.0, 1.0]])
    before = logits.clone()
    first, second = sample(logits, [row(temperature=0.0, logit_bias={0: -9.0}), row(temperature=0.0)])
    assert (first.token_id, second.token_id) == (1, 0)
    assert torch.equal(logits, before)


# Log-probabilities

def test_logprobs_are_the_raw_models() -> None:
    options: dict[str, Any] = {"temperature": 0.3, "top_k": 1, "logit_bias": {1: 50.0}, "logprobs": 2}
    sampled = sample_one(LADDER, row(**options))
    assert sampled.token_id == 1
    assert sampled.logprob == pytest.approx(math.log(0.05), abs=1e-6)
    assert [token_id for token_id, _ in sampled.top] == [0, 2]
    assert [logprob for _, logprob in sampled.top] == pytest.approx([math.log(0.40), math.log(0.25)], abs=1e-6)


def test_logprobs_are_absent_unless_asked_for() -> None:
    plain, chosen_only = sample(LADDER.expand(2, -1), [row(), row(logprobs=0)])
    assert (plain.logprob, plain.top) == (None, ())
    assert chosen_only.logprob is not None
    assert chosen_only.top == ()


def test_more_alternatives_than_tokens_gives_all_best_first_and_equals_by_id() -> None:
    scored = score(torch.tensor([[1.0, 2.0, 1.0, 2.0]]), [2], [9])[0]
    assert [token_id for token_id, _ in scored.top] == [1, 3, 0, 2]
    assert sum(math.exp(logprob) for _, logprob in scored.top) == pytest.approx(1)
    assert scored.logprob == scored.top[3][1]


def test_no_rows() -> None:
    assert sample(torch.empty(0, 5), []) == []
