"""Logits to tokens on the device: `engine/sampler.py`'s temperature, top-k, top-p, min-p and draw, without sorting the vocabulary.

    largest ── temperature 0? that is the token
       │
       ├─ top-k: the key of the k-th largest logit          ┐ a search for a cut: the largest key whose tokens from it upward hold
       ├─ top-p: the key where the nucleus reaches p        ┘ `target` (a count, or a weight)
       └─ draw: the first token, in vocabulary order, whose cumulative weight exceeds `fraction` of all that is kept

A key is a logit's bits as an unsigned number of the same order. The search fixes two bits of it in a pass over the row (a radix select),
so 16 passes, or 8 of logits of 16 bits, find it whatever the values are; a row is read from L2 after the first. Among tokens of the cut's
own key the lower ids are kept, as many as the filter has room for. A program takes a row; weights are relative to the likeliest token's
and fp32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap import after_predecessor, overlapping

TILE = 8192
NUM_WARPS = 16


@dataclass(frozen=True)
class Draws:
    """How each of R rows is sampled; meanings and ranges as in SamplingParams."""

    temperature: Tensor       # [R] fp32; 0: the largest logit, the lowest id among equals
    top_k: Tensor             # [R] int32; 0: all
    top_p: Tensor             # [R] fp32
    min_p: Tensor             # [R] fp32
    fraction: Tensor          # [R] fp32 in [0, 1]: the row's uniform number


def sample(logits: Tensor, draws: Draws, tile: int = TILE, refuse_infinite: bool = False, out: Tensor | None = None) -> Tensor:
    """logits [R, vocab] bf16, fp16 or fp32, penalties and masks (-inf) already in it, none NaN → token ids [R] int64.

    With `refuse_infinite`, for logits as they come from a model, a row that holds NaN or an infinity gets -1. They are written to `out`,
    if there is one.
    """
    token_ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device) if out is None else out
    if len(logits):
        _sample_kernel[(len(logits),)](
            token_ids, logits, draws.temperature, draws.top_k, draws.top_p, draws.min_p, draws.fraction,
            logits.shape[1], logits.stride(0), REFUSE_INFINITE=refuse_infinite, TILE=tile, num_warps=NUM_WARPS,
            **overlapping(),
        )  # fmt: skip
    return token_ids


@triton.jit
def _sample_kernel(
    token_ids, logits, temperature, top_k, top_p, min_p, fraction, vocab, row_stride,
    REFUSE_INFINITE: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_predecessor(PDL)
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    heat, k = tl.load(temperature + row), tl.load(top_k + row)
    most, best = _largest(logits, vocab, TILE)
    token = best
    if heat > 0.0:
        cut = tl.full([], 0, tl.uint32)     # below every key: all tokens are above it
        ties = vocab * 1.0                 # how many tokens of the cut's own key are kept
        share = 1.0                         # the same, as a part of them
        if (k > 0) & (k < vocab):
            cut = _cut(logits, vocab, most, heat, cut, share, k.to(tl.float32), False, TILE)
            above, level = _around(logits, vocab, most, heat, cut, cut, share, False, TILE)
            ties = k.to(tl.float32) - above
            share = ties / level
        p = tl.load(top_p + row)
        if p < 1.0:
            above, level = _around(logits, vocab, most, heat, cut, cut, share, True, TILE)
            target = tl.maximum(p * (above + level), 1e-30)         # one token at least
            nucleus = _cut(logits, vocab, most, heat, cut, share, target, True, TILE)
            above, level = _around(logits, vocab, most, heat, nucleus, cut, share, True, TILE)
            room = tl.maximum(tl.ceil((target - above) / _weight_of(nucleus, most, heat, logits.dtype.element_ty)), 1.0)
            ties = tl.where(nucleus == cut, tl.minimum(room, ties), room)
            cut = nucleus
        token = _draw(logits, vocab, most, heat, cut, ties, tl.load(min_p + row), tl.load(fraction + row), best, TILE)
    if REFUSE_INFINITE:
        token = tl.where(_is_finite(logits, vocab, TILE), token, -1)
    tl.store(token_ids + row, token.to(tl.int64))


@triton.jit
def _is_finite(logits, vocab, TILE: tl.constexpr):
    """A finite number times 0 is 0; NaN and the infinities become NaN, which no sum loses."""
    zeros = tl.zeros([TILE], tl.float32)
    for start in range(0, vocab, TILE):
        ids = start + tl.arange(0, TILE)
        zeros += tl.load(logits + ids, mask=ids < vocab, other=0.0).to(tl.float32) * 0.0
    return tl.sum(zeros, 0) == 0.0


@triton.jit
def _largest(logits, vocab, TILE: tl.constexpr):
    """The largest logit and the lowest id that has it."""
    most = tl.full([TILE], float("-inf"), tl.float32)
    first = tl.zeros([TILE], tl.int32)
    for start in range(0, vocab, TILE):
        ids = start + tl.arange(0, TILE)
        values = tl.load(logits + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        first = tl.where(values > most, ids, first)
        most = tl.maximum(most, values)
    largest = tl.max(most, 0)
    return largest, tl.min(tl.where(most == largest, first, vocab - 1), 0)


@triton.jit
def _keys(logits, start, vocab, most, heat, TILE: tl.constexpr):
    """A tile's ids, keys (0 past the vocabulary, more for every token) and weights."""
    ids = start + tl.arange(0, TILE)
    values = tl.load(logits + ids, mask=ids < vocab, other=float("-inf"))
    if values.dtype.primitive_bitwidth == 32:
        bits = values.to(tl.uint32, bitcast=True)
        bits = tl.where((bits & 0x7FFFFFFF) == 0, 0, bits)                # -0 and 0 are one value
        keys = tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    else:
        bits = values.to(tl.uint16, bitcast=True).to(tl.uint32)
        bits = tl.where((bits & 0x7FFF) == 0, 0, bits)
        keys = tl.where((bits >> 15) == 1, bits ^ 0xFFFF, bits | 0x8000)
    return ids, tl.where(ids < vocab, keys, 0), tl.exp((values.to(tl.float32) - most) / heat)


@triton.jit
def _weight_of(key, most, heat, dtype: tl.constexpr):
    if dtype.primitive_bitwidth == 32:
        value = tl.where((key >> 31) == 1, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF).to(tl.float32, bitcast=True)
    else:
        value = tl.where((key >> 15) == 1, key & 0x7FFF, key ^ 0xFFFF).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
    return tl.exp((value - most) / heat)


@triton.jit
def _measure(keys, weights, cut, share, MASS: tl.constexpr):
    """What each token counts, after the filters so far have cut at `cut` and kept `share` of the tokens there."""
    each = weights
    if not MASS:
        each = tl.full(weights.shape, 1.0, tl.float32)
    return tl.where(keys > cut, each, tl.where(keys == cut, each * share, 0.0))


@triton.jit
def _cut(logits, vocab, most, heat, cut, share, target, MASS: tl.constexpr, TILE: tl.constexpr):
    """The largest key whose tokens, with all of larger keys, measure `target` or more."""
    found = tl.full([], 0, tl.uint32)
    bits: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth
    unit = tl.full([], 1 << (bits - 2), tl.uint32)
    for _pass in range(bits // 2):
        one = tl.zeros([TILE], tl.float32)
        two = tl.zeros([TILE], tl.float32)
        three = tl.zeros([TILE], tl.float32)
        for start in range(0, vocab, TILE):
            _, keys, weights = _keys(logits, start, vocab, most, heat, TILE)
            measure = _measure(keys, weights, cut, share, MASS)
            one += tl.where(keys >= (found | unit), measure, 0.0)
            two += tl.where(keys >= (found | (unit << 1)), measure, 0.0)
            three += tl.where(keys >= (found | unit | (unit << 1)), measure, 0.0)
        digit = (tl.sum(one, 0) >= target).to(tl.uint32) + (tl.sum(two, 0) >= target).to(tl.uint32)
        found |= (digit + (tl.sum(three, 0) >= target).to(tl.uint32)) * unit
        unit = unit >> 2
    return found


@triton.jit
def _around(logits, vocab, most, heat, pivot, cut, share, MASS: tl.constexpr, TILE: tl.constexpr):
    """The measure of the tokens above the pivot, and of those at it."""
    above = tl.zeros([TILE], tl.float32)
    level = tl.zeros([TILE], tl.float32)
    for start in range(0, vocab, TILE):
        _, keys, weights = _keys(logits, start, vocab, most, heat, TILE)
        measure = _measure(keys, weights, cut, share, MASS)
        above += tl.where(keys > pivot, measure, 0.0)
        level += tl.where(keys == pivot, measure, 0.0)
    return tl.sum(above, 0), tl.sum(level, 0)


@triton.jit
def _draw(logits, vocab, most, heat, cut, ties, floor, fraction, best, TILE: tl.constexpr):
    """Two passes: how much is kept, and which token holds `fraction` of it; `best` if rounding leaves none."""
    total = 0.0
    seen = 0.0
    for start in range(0, vocab, TILE):
        _, keys, weights = _keys(logits, start, vocab, most, heat, TILE)
        kept, seen = _kept(keys, weights, cut, ties, floor, seen)
        total += tl.sum(kept, 0)
    target = total * fraction
    passed = 0.0
    seen = 0.0
    token = best
    is_found = False
    for start in range(0, vocab, TILE):
        ids, keys, weights = _keys(logits, start, vocab, most, heat, TILE)
        kept, seen = _kept(keys, weights, cut, ties, floor, seen)
        if not is_found:
            cumulative = passed + tl.cumsum(kept, 0)
            hit = tl.min(tl.where((kept > 0.0) & (cumulative > target), ids, vocab), 0)
            last = tl.max(tl.where(kept > 0.0, ids, -1), 0)         # if rounding lets no token exceed the target: the last one kept
            token = tl.where(hit < vocab, hit, tl.where(last >= 0, last, token))
            is_found = hit < vocab
            passed += tl.sum(kept, 0)
    return token


@triton.jit
def _kept(keys, weights, cut, ties, floor, seen):
    """A tile's weights, 0 where a filter cut, and how many tokens at the cut there were up to its end."""
    at_cut = (keys == cut).to(tl.float32)
    rank = seen + tl.cumsum(at_cut, 0)
    stays = (keys > cut) | ((keys == cut) & (rank <= ties))
    return tl.where(stays & (weights >= floor), weights, 0.0), seen + tl.sum(at_cut, 0)
