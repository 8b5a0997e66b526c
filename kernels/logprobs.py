"""Log-probabilities of tokens and of the likeliest, from logits as they come from a model. Meanings as in `engine/sampler.py`.

    logits [R, vocab] ──► largest ──► Σ exp(logit - largest) ──► the token's ──► the largest, the next, … ──► logprobs, ids

A program takes a row, and each of its passes reads that from L2; of n likeliest there are n + 2 passes, sums in fp32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap import after_predecessor, overlapping

TILE = 8192
NUM_WARPS = 16


def token_logprobs(
    logits: Tensor, rows: Tensor, tokens: Tensor, sampled: Tensor, num_top: Tensor, most_top: int, tile: int = TILE
) -> tuple[Tensor, Tensor]:
    """→ logprobs [S, 1 + most_top] fp32: the token's, then those of the likeliest, best first; ids [S, most_top] int32 of the latter, the
    lower first among equals. A row of logits that holds NaN or an infinity has NaN for the token's; what is behind num_top[s] is not set.

    logits [R, vocab] of any type; rows, tokens, num_top [S] int32. A token of -1 - i is sampled[i] (int64), and may be -1 itself, of
    logits that are no numbers. num_top[s] ≤ most_top, vocab.
    """
    num_rows = len(rows)
    logprobs = torch.empty(num_rows, 1 + most_top, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_rows, most_top, dtype=torch.int32, device=logits.device)
    _logprobs_kernel[(num_rows,)](
        logprobs, ids, logits, rows, tokens, sampled, num_top, logits.shape[1], logits.stride(0), most_top,
        TILE=tile, num_warps=NUM_WARPS, **overlapping(),
    )  # fmt: skip
    return logprobs, ids


@triton.jit(do_not_specialize=["most_top"])
def _logprobs_kernel(
    logprobs, ids, logits, rows, tokens, sampled, num_top, vocab, row_stride, most_top, TILE: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    after_predecessor(PDL)
    at = tl.program_id(0).to(tl.int64)
    logits += tl.load(rows + at).to(tl.int64) * row_stride
    logprobs += at * (1 + most_top)
    ids += at * most_top
    token = tl.load(tokens + at).to(tl.int64)
    if token < 0:
        token = tl.maximum(tl.load(sampled + (-1 - token)), 0)
    last, last_id = tl.full([], float("inf"), tl.float32), tl.full([], -1, tl.int32)
    most, _ = _largest_after(logits, vocab, last, last_id, TILE)
    log_total = _log_total(logits, vocab, most, TILE)
    tl.store(logprobs, tl.load(logits + token).to(tl.float32) - most - log_total)
    for place in range(tl.load(num_top + at)):
        last, last_id = _largest_after(logits, vocab, last, last_id, TILE)
        tl.store(ids + place, last_id)
        tl.store(logprobs + 1 + place, last - most - log_total)


@triton.jit
def _log_total(logits, vocab, most, TILE: tl.constexpr):
    """log Σ exp(logit - most); NaN if a logit is no finite number."""
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, vocab, TILE):
        ids = start + tl.arange(0, TILE)
        values = tl.load(logits + ids, mask=ids < vocab, other=0.0).to(tl.float32)
        total += tl.where(ids < vocab, tl.exp(values - most), 0.0) + values * 0.0
    return tl.log(tl.sum(total, 0))


@triton.jit
def _largest_after(logits, vocab, last, last_id, TILE: tl.constexpr):
    """The largest logit below `last`, or equal to it with a higher id than `last_id`, and the lowest id that has it."""
    most = tl.full([TILE], float("-inf"), tl.float32)
    first = tl.full([TILE], 0, tl.int32)
    for start in range(0, vocab, TILE):
        ids = start + tl.arange(0, TILE)
        values = tl.load(logits + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        values = tl.where((values < last) | ((values == last) & (ids > last_id)), values, float("-inf"))
        first = tl.where(values > most, ids, first)
        most = tl.maximum(most, values)
    largest = tl.max(most, 0)
    return largest, tl.min(tl.where(most == largest, first, vocab - 1), 0)
