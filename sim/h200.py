"""What a step costs on one H200 with a Llama-3-8B shape in bf16, from measured times.

MEASURED holds vLLM 0.26.0 on one GPU (CUDA graphs on, prefix cache off, dummy weights): the prefill rows are the time to the first token of
prompts that come together, the decode rows one step. `fitted()` is the linear step model through them with the least squared relative
errors, without bends. What it leaves is in docs/routing.md.
"""

from functools import cache

import numpy as np

from ..engine.predictor import SCALES, model_with, regressors, solve_non_negative
from ..messages.steps import StepFeatures, StepModel, attended_pairs

NUM_STRAIGHT = 5
"""Coefficients of a step model without bends."""

KV_TOKEN_BYTES = 128 << 10
"""8 KV heads × 128 × K and V × 2 bytes × 32 layers."""

BLOCK_SIZE = 64
NUM_BLOCKS = 12_800
"""107 GB: nine tenths of 141 GB, less 15 GB of weights and 5 GB of activations."""

LINK_BYTES_PER_S = 365e9
"""A Triton kernel that stores 64 KiB pages into the peer's memory, over NVLink."""


def _prefill(count: int, tokens: int) -> StepFeatures:
    return StepFeatures(prefill_tokens=count * tokens, prefill_pairs=count * attended_pairs(0, tokens))


def _decode(count: int, context: int) -> StepFeatures:
    return StepFeatures(num_decoding=count, decode_context=count * context)


MEASURED: tuple[tuple[StepFeatures, float], ...] = (
    (_prefill(1, 128), 8.9e-3),
    (_prefill(1, 1024), 26.5e-3),
    (_prefill(1, 2048), 51.4e-3),
    (_prefill(1, 8192), 213.7e-3),
    (_prefill(4, 2048), 192.6e-3),
    (_prefill(8, 1024), 190.2e-3),
    (_prefill(1, 16_384), 487.6e-3),
    (_decode(1, 128), 4.89e-3),
    (_decode(1, 1024), 4.92e-3),
    (_decode(8, 1024), 5.25e-3),
    (_decode(32, 1024), 6.52e-3),
    (_decode(64, 1024), 7.97e-3),
    (_decode(128, 1024), 10.97e-3),
    (_decode(256, 1024), 18.78e-3),
    (_decode(64, 4096), 14.38e-3),
    (_decode(1, 16_000), 5.35e-3),
)


@cache
def fitted() -> StepModel:
    terms = np.array([regressors(features) / seconds for features, seconds in MEASURED])[:, :NUM_STRAIGHT] / SCALES[:NUM_STRAIGHT]
    straight = solve_non_negative(terms.T @ terms, terms.sum(axis=0)) / SCALES[:NUM_STRAIGHT]
    return model_with((*straight, 0.0, 0.0), error=0.0, num_observed=len(MEASURED))


def residuals() -> list[float]:
    """fitted / measured − 1, row by row."""
    return [fitted().step_s(features) / seconds - 1 for features, seconds in MEASURED]
