"""What a GPU's step is made of once it has ended; the step itself is made up here."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from diptych.engine.cuda_runner import Queued
from diptych.engine.device_sampler import Scores
from diptych.engine.model_runner import ChunkOutput
from diptych.engine.row_extras import ScoredRows
from diptych.engine.sampler import Sampled

NAN = float("nan")
BROKEN = ChunkOutput(None, is_finite=False)


def outputs(tokens: list[int], samples: tuple[bool, ...], scores: Scores | None = None) -> list[ChunkOutput]:
    event: Any = SimpleNamespace(synchronize=lambda: None, query=lambda: True)
    return Queued(event, torch.tensor(tokens), samples, scores).wait()


def scored(rows: ScoredRows, logprobs: list[list[float]]) -> Scores:
    table = torch.tensor(logprobs)
    return Scores(rows, table, torch.arange(table.shape[0] * (table.shape[1] - 1), dtype=torch.int32).view(len(table), -1))


def rows(tokens: list[int], num_prompt: tuple[int, ...], is_sampled: tuple[bool, ...], num_top: int = 0) -> ScoredRows:
    places = np.arange(len(tokens), dtype=np.int32)
    return ScoredRows(places, np.array(tokens, dtype=np.int32), np.full_like(places, num_top), num_prompt, is_sampled)


def test_tokens_of_those_that_sample_and_what_was_no_number() -> None:
    assert outputs([7, -1, 9], (True, False, True, True)) == [ChunkOutput(Sampled(7)), ChunkOutput(None), BROKEN, ChunkOutput(Sampled(9))]


def test_scores_of_prompts_and_of_sampled_tokens() -> None:
    wanted = rows([5, 6, -1, -3], (2, 0, 0), (True, False, True), num_top=1)
    scores = scored(wanted, [[-1.0, -0.5], [-2.0, -0.25], [-3.0, -0.125], [-4.0, -0.75]])
    assert outputs([7, 8, 9], (True, True, True), scores) == [
        ChunkOutput(Sampled(7, -3.0, ((2, -0.125),)), (Sampled(5, -1.0, ((0, -0.5),)), Sampled(6, -2.0, ((1, -0.25),)))),
        ChunkOutput(Sampled(8)),
        ChunkOutput(Sampled(9, -4.0, ((3, -0.75),))),
    ]


def test_a_prompt_that_goes_on_has_scores_and_no_token() -> None:
    assert outputs([], (False,), scored(rows([5], (1,), (False,)), [[-1.0]])) == [ChunkOutput(None, (Sampled(5, -1.0),))]


def test_whose_logits_are_no_numbers_has_broken_down_and_nobody_else() -> None:
    """A sampled token's, a prompt's."""
    wanted = rows([-1, 5, 6, -3], (0, 2, 0), (True, False, True))
    scores = scored(wanted, [[NAN], [-1.0], [NAN], [-2.0]])
    assert outputs([-1, 8, 9], (True, True, True), scores) == [BROKEN, BROKEN, ChunkOutput(Sampled(9, -2.0))]
