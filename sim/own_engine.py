"""What a step of this project's own engine costs on a GPU, with a Llama-3-8B shape in bf16: from its measured times, docs/benchmarks.md.

    T = A·√(1 + (rows / knee)²) + c·pairs + e·context

Products read all weights, which takes A, and compute `rows` tokens, prompt's and decodes' alike, which takes as long at `knee` rows: a step
takes little more than the longer of the two. Attention comes on top. A step with prompts has as many rows as its CUDA graph
(`engine/prompt_steps.py`). The fit has the least squared relative errors, like h200.py's; what it leaves is in docs/routing.md. Steps that
serve take SERVED times as long: so the simulation meets what two H100 did.
"""

from functools import cache

import numpy as np
from msgspec import Struct

from ..engine import prompt_steps
from ..engine.prompt_steps import StepShape, shape_for, step_shapes
from ..messages.steps import StepFeatures, attended_pairs

MAX_STEP_TOKENS, MAX_SEQUENCES = 2048, 256
"""Of GPU workers, as `diptych up` starts them."""

KNEES = range(50, 600, 2)

SERVED = 1.04

HOP_S = 2e-3
"""A message, with its share of HTTP, tokenizing and Python: so, too, the simulation meets what two H100 did."""

NUM_BLOCKS_H100 = 6_300
"""53 GB: nine tenths of 80 GB, less 16 GB of weights and 3 GB of activations and graphs."""


class EngineCost(Struct, frozen=True):
    weights_s: float                          # A: to read all weights once
    knee: float                               # rows that take as long to compute
    pair_s: float
    context_s: float                          # KV of one token, read by a decode

    def step_s(self, features: StepFeatures) -> float:
        return self.rows_s(rows_of(features)) + self.pair_s * features.prefill_pairs + self.context_s * features.decode_context

    def rows_s(self, rows: int) -> float:
        return self.weights_s * float(np.hypot(1.0, rows / self.knee))


def rows_of(features: StepFeatures) -> int:
    """That are computed: with prompts, padding included."""
    rows = features.prefill_tokens + features.num_decoding
    if not features.prefill_tokens:
        return rows
    shape = shape_for(_shapes(), rows, features.num_decoding + 1, single_rows=features.num_decoding > 0)
    return rows if shape is None else shape.tokens


def padded_rows() -> tuple[int, ...]:
    """Of steps with prompts beside decodes, ascending."""
    return tuple(prompt_steps.padded_rows(_shapes()))


@cache
def _shapes() -> list[StepShape]:
    return step_shapes(MAX_STEP_TOKENS, MAX_SEQUENCES)


def _prompts(count: int, tokens: int) -> StepFeatures:
    return StepFeatures(prefill_tokens=count * tokens, prefill_pairs=count * attended_pairs(0, tokens))


def _decodes(count: int, context: int) -> StepFeatures:
    return StepFeatures(num_decoding=count, decode_context=count * context)


Measured = tuple[tuple[StepFeatures, float], ...]

H100: Measured = (
    (_decodes(1, 1024), 5.842e-3),
    (_decodes(8, 1024), 6.299e-3),
    (_decodes(32, 1024), 8.094e-3),
    (_decodes(64, 1024), 9.534e-3),
    (_decodes(128, 1024), 12.74e-3),
    (_decodes(64, 4096), 18.00e-3),
    (_decodes(1, 16_000), 6.56e-3),
    (_prompts(1, 64), 7.0e-3),
    (_prompts(1, 128), 7.3e-3),
    (_prompts(1, 384), 10.7e-3),              # of 300 tokens, by a graph of 384
    (_prompts(1, 1024), 24.4e-3),
    (_prompts(16, 64), 23.7e-3),
    (_prompts(1, 2048), 48.7e-3),
    (_prompts(1, 8192), 219.9e-3),            # to the first token, colocated
)

H200: Measured = (                            # decode of the first version, prefill with pages by TMA; 128 tokens were bound by launching
    (_decodes(1, 128), 4.60e-3),
    (_decodes(1, 1024), 4.62e-3),
    (_decodes(8, 1024), 5.02e-3),
    (_decodes(32, 1024), 5.99e-3),
    (_decodes(64, 1024), 7.31e-3),
    (_decodes(128, 1024), 9.66e-3),
    (_decodes(256, 1024), 15.2e-3),
    (_decodes(64, 4096), 12.9e-3),
    (_decodes(1, 16_000), 5.18e-3),
    (_prompts(1, 1024), 24.2e-3),
    (_prompts(1, 2048), 48.6e-3),
    (_prompts(1, 8192), 218e-3),
    (_prompts(4, 2048), 191e-3),
    (_prompts(8, 1024), 189e-3),
    (_prompts(1, 16_384), 516e-3),
)


@cache
def fitted(measured: Measured) -> EngineCost:
    """Linear in A, c and e for a given knee."""
    seconds = np.array([seconds for _, seconds in measured])
    rows, pairs, context = (np.array(column) for column in zip(*map(_terms, measured), strict=True))

    def fit(knee: float) -> tuple[float, EngineCost]:
        terms = np.stack([np.hypot(1.0, rows / knee), pairs, context], axis=1) / seconds[:, None]
        solution = np.linalg.lstsq(terms, np.ones(len(seconds)), rcond=None)[0]
        weights_s, pair_s, context_s = (float(value) for value in solution)
        return float(((terms @ solution - 1) ** 2).sum()), EngineCost(weights_s, knee, pair_s, context_s)

    return min((fit(knee) for knee in KNEES), key=lambda tried: tried[0])[1]


def served(measured: Measured) -> EngineCost:
    cost = fitted(measured)
    return EngineCost(SERVED * cost.weights_s, cost.knee, SERVED * cost.pair_s, SERVED * cost.context_s)


def _terms(row: tuple[StepFeatures, float]) -> tuple[int, int, int]:
    return rows_of(row[0]), row[0].prefill_pairs, row[0].decode_context


def residuals(measured: Measured) -> list[float]:
    """fitted / measured − 1, row by row."""
    return [fitted(measured).step_s(features) / seconds - 1 for features, seconds in measured]
