"""Logits to tokens on the device: `engine/sampler.py`'s temperature, top-k, top-p, min-p and draw, without sorting the vocabulary.

    largest ── temperature 0? that is the token
       │
       ├─ top-k: the key of the k-th largest logit          ┐ a search for a cut: the largest key whose tokens from it upward hold
       ├─ top-p: the key where the nucleus reaches p        ┘ `target` (a count, or a weight)
       └─ draw: the first token, in vocabulary order, whose cumulative weight exceeds `fraction` of all that is kept

A key is a logit's bits as an unsigned number of the same order. The search fixes two bits of it in a pass over the row (a radix select),
so 16 passes, or 8 of logits of 16 bits, find it whatever the values are; a row is read from L2 after the first. Among tokens of the cut's
own key the lower ids are kept, as many as the filter has room for. Weights are relative to the likeliest token's and fp32.

Passes are bound by arithmetic, so several programs share a row while there are multiprocessors for them:

    program 0   ▓▓▓▓│ meet │▓▓▓▓│ meet │ …     each computes some of the row's GROUPS groups of tokens, and stores each group's sums;
    program 1   ▓▓▓▓│      │▓▓▓▓│      │ …     all of them then add up the same sums in the same order

So what comes out does not depend on how many programs there are, and a row's token not on its batch mates. They wait for each other, hence
all of a launch must be on the device at once: there are never more than multiprocessors, and what runs beside them ends by itself. (Two
processes that sample on one GPU at the same time, through MPS, could hold each other up for ever: a worker has its GPU for itself.)
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap import after_predecessor, overlapping

TILE_BYTES = 16384              # of logits: what a program has in registers at once
LANES_BYTES = 512               # what a warp loads at once: sums over so many need no other warp
NUM_WARPS = 16
GROUPS = tl.constexpr(8)        # of a row's tokens, as long as each other; a power of two


@dataclass(frozen=True)
class Draws:
    """How each of R rows is sampled; meanings and ranges as in SamplingParams."""

    temperature: Tensor       # [R] fp32; 0: the largest logit, the lowest id among equals
    top_k: Tensor             # [R] int32; 0: all
    top_p: Tensor             # [R] fp32
    min_p: Tensor             # [R] fp32
    fraction: Tensor          # [R] fp32 in [0, 1]: the row's uniform number


def sample(
    logits: Tensor, draws: Draws, tile: int | None = None, refuse_infinite: bool = False, out: Tensor | None = None,
    programs: int | None = None,
) -> Tensor:  # fmt: skip
    """logits [R, vocab] bf16, fp16 or fp32, penalties and masks (-inf) already in it, none NaN → token ids [R] int64.

    With `refuse_infinite`, for logits as they come from a model, a row that holds NaN or an infinity gets -1. They are written to `out`,
    if there is one. `programs` that share a row: 1, 2, 4 or 8; None: as many as fit. Launches of one device must not run side by side.
    """
    num_rows, vocab = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device) if out is None else out
    if num_rows:
        lanes = LANES_BYTES // logits.element_size()
        tile = tile or TILE_BYTES // logits.element_size()
        sums = torch.empty(num_rows, 2, 3, GROUPS.value, tile // lanes, dtype=torch.float32, device=logits.device)
        programs = programs or _programs(num_rows, logits.device)
        assert tile >= lanes, f"a tile of {tile} logits is less than what a warp loads, {lanes}"
        assert programs == 1 or logits.device.type != "cuda" or programs * num_rows <= _multiprocessors(logits.device)
        _sample_kernel[(programs, num_rows)](
            token_ids, sums, _arrivals(logits.device), logits,
            draws.temperature, draws.top_k, draws.top_p, draws.min_p, draws.fraction, vocab, logits.stride(0),
            REFUSE_INFINITE=refuse_infinite, PROGRAMS=programs, LANES=lanes, TILE=tile, num_warps=NUM_WARPS, **overlapping(),
        )  # fmt: skip
    return token_ids


def _programs(num_rows: int, device: torch.device) -> int:
    """To share a row. The interpreter runs programs one after the other: none may wait for another there."""
    return next((count for count in (8, 4, 2) if count * num_rows <= _multiprocessors(device)), 1)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


@cache
def _arrivals(device: torch.device) -> Tensor:
    """Of the programs of each row that several share: zero between launches."""
    return torch.zeros(_multiprocessors(device) // 2, dtype=torch.int32, device=device)


@triton.jit
def _sample_kernel(
    token_ids, sums, arrivals, logits, temperature, top_k, top_p, min_p, fraction, vocab, row_stride,
    REFUSE_INFINITE: tl.constexpr, PROGRAMS: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_predecessor(PDL)
    row = tl.program_id(1).to(tl.int64)
    heat, k = tl.load(temperature + row), tl.load(top_k + row)
    span = tl.cdiv(tl.cdiv(vocab, TILE), GROUPS) * TILE
    shared = (logits + row * row_stride, vocab, span, sums + row * (6 * GROUPS * (TILE // LANES)), arrivals + row)
    most, best, is_finite = _largest(shared, PROGRAMS, LANES, TILE)
    token = best
    is_mine = tl.program_id(0) == 0
    phase = tl.full([], 1, tl.int32)
    if heat > 0.0:
        scale = 1.4426950408889634 / heat
        cut = tl.full([], 0, tl.uint32)     # below every key: all tokens are above it
        ties = vocab * 1.0                 # how many tokens of the cut's own key are kept
        share = 1.0                         # the same, as a part of them
        if (k > 0) & (k < vocab):
            cut, phase = _cut(shared, phase, most, scale, cut, share, k.to(tl.float32), False, PROGRAMS, LANES, TILE)
            above, level, phase = _around(shared, phase, most, scale, cut, cut, share, False, PROGRAMS, LANES, TILE)
            ties = k.to(tl.float32) - above
            share = ties / level
        p = tl.load(top_p + row)
        if p < 1.0:
            above, level, phase = _around(shared, phase, most, scale, cut, cut, share, True, PROGRAMS, LANES, TILE)
            target = tl.maximum(p * (above + level), 1e-30)         # one token at least
            nucleus, phase = _cut(shared, phase, most, scale, cut, share, target, True, PROGRAMS, LANES, TILE)
            above, level, phase = _around(shared, phase, most, scale, nucleus, cut, share, True, PROGRAMS, LANES, TILE)
            room = tl.maximum(tl.ceil((target - above) / _weight_of(nucleus, most, scale, logits.dtype.element_ty)), 1.0)
            ties = tl.where(nucleus == cut, tl.minimum(room, ties), room)
            cut = nucleus
        floor, at = tl.load(min_p + row), tl.load(fraction + row)
        token, is_mine, phase = _draw(shared, phase, most, scale, cut, ties, floor, at, best, PROGRAMS, LANES, TILE)
    if REFUSE_INFINITE:
        token = tl.where(is_finite, token, -1)
    tl.store(token_ids + row, token.to(tl.int64), mask=is_mine)
    _part(shared, phase, PROGRAMS)


@triton.jit
def _meet(shared, phase, PROGRAMS: tl.constexpr):
    """All programs of the row have stored their sums of this phase. → the next one."""
    arrivals = shared[4]
    tl.debug_barrier()
    if PROGRAMS > 1:
        tl.atomic_add(arrivals, 1, sem="release")
        while tl.atomic_add(arrivals, 0, sem="acquire") < PROGRAMS * (phase + 1):
            pass
        tl.debug_barrier()
    return phase + 1


@triton.jit
def _part(shared, phase, PROGRAMS: tl.constexpr):
    """Whoever leaves last leaves zero."""
    arrivals = shared[4]
    if PROGRAMS > 1:
        is_last = tl.atomic_add(arrivals, 1) == PROGRAMS * (phase + 1) - 1
        tl.store(arrivals, 0, mask=is_last)


@triton.jit
def _places(shared, phase, which: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr):
    """Of a sum of every LANES tokens of a tile, of the first group. Two phases' are there: whoever stores those of the next one has met all
    who have read those of the one before."""
    return shared[3] + ((phase & 1) * 3 + which) * (GROUPS * (TILE // LANES)) + tl.arange(0, TILE // LANES)


@triton.jit
def _store(shared, phase, which: tl.constexpr, group, values, LANES: tl.constexpr, TILE: tl.constexpr):
    tl.store(_places(shared, phase, which, LANES, TILE) + group * (TILE // LANES), values)


@triton.jit
def _stored(shared, phase, which: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr):
    """[GROUPS, TILE // LANES], after they have met. Not from L1, where the line may lie as it was."""
    places = _places(shared, phase, which, LANES, TILE)[None, :] + tl.arange(0, GROUPS)[:, None] * (TILE // LANES)
    return tl.load(places, cache_modifier=".cg")


@triton.jit
def _of_groups(shared, phase, which: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr):
    """[GROUPS]"""
    return tl.sum(_stored(shared, phase, which, LANES, TILE), 1)


@triton.jit
def _total(shared, phase, which: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr):
    return tl.sum(_of_groups(shared, phase, which, LANES, TILE), 0)


@triton.jit
def _ids(start, LANES: tl.constexpr, TILE: tl.constexpr):
    """Of a tile: a warp's are side by side."""
    return start + tl.arange(0, TILE // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def _mine(PROGRAMS: tl.constexpr):
    """The first of this program's groups, and the one behind the last."""
    each: tl.constexpr = GROUPS // PROGRAMS
    return tl.program_id(0) * each, (tl.program_id(0) + 1) * each


@triton.jit
def _largest(shared, PROGRAMS: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr):
    """The largest logit, the lowest id that has it, and whether all logits are finite: such a number times 0 is 0, NaN and the infinities
    become NaN, which no sum loses."""
    logits, vocab, span = shared[0], shared[1], shared[2]
    begin, end = _mine(PROGRAMS)
    for group in range(begin, end):
        most = tl.full([TILE // LANES, LANES], float("-inf"), tl.float32)
        first = tl.zeros([TILE // LANES, LANES], tl.int32)
        zeros = tl.zeros([TILE // LANES, LANES], tl.float32)
        for start in range(group * span, tl.minimum((group + 1) * span, vocab), TILE):
            ids = _ids(start, LANES, TILE)
            values = tl.load(logits + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
            first = tl.where(values > most, ids, first)
            most = tl.maximum(most, values)
            zeros += tl.where(ids < vocab, values * 0.0, 0.0)
        largest = tl.max(most, 1)
        lowest = tl.min(tl.where(most == largest[:, None], first, vocab - 1), 1)
        _store(shared, 0, 0, group, largest, LANES, TILE)
        _store(shared, 0, 1, group, lowest.to(tl.float32), LANES, TILE)
        _store(shared, 0, 2, group, tl.sum(zeros, 1), LANES, TILE)
    _meet(shared, 0, PROGRAMS)
    most = _stored(shared, 0, 0, LANES, TILE)
    largest = tl.max(tl.max(most, 1), 0)
    lowest = tl.where(most == largest, _stored(shared, 0, 1, LANES, TILE), vocab - 1.0)
    return largest, tl.min(tl.min(lowest, 1), 0).to(tl.int32), _total(shared, 0, 2, LANES, TILE) == 0.0


@triton.jit
def _keys(logits, ids, vocab, most, scale):
    """Of tokens: 0 past the vocabulary and more for all others; and their weights."""
    values = tl.load(logits + ids, mask=ids < vocab, other=float("-inf"))
    if values.dtype.primitive_bitwidth == 32:
        bits = values.to(tl.uint32, bitcast=True)
        bits = tl.where((bits & 0x7FFFFFFF) == 0, 0, bits)                # -0 and 0 are one value
        keys = tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    else:
        bits = values.to(tl.uint16, bitcast=True).to(tl.uint32)
        bits = tl.where((bits & 0x7FFF) == 0, 0, bits)
        keys = tl.where((bits >> 15) == 1, bits ^ 0xFFFF, bits | 0x8000)
    return tl.where(ids < vocab, keys, 0), tl.exp2((values.to(tl.float32) - most) * scale)


@triton.jit
def _weight_of(key, most, scale, dtype: tl.constexpr):
    if dtype.primitive_bitwidth == 32:
        value = tl.where((key >> 31) == 1, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF).to(tl.float32, bitcast=True)
    else:
        value = tl.where((key >> 15) == 1, key & 0x7FFF, key ^ 0xFFFF).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
    return tl.exp2((value - most) * scale)


@triton.jit
def _measure(keys, weights, cut, share, MASS: tl.constexpr):
    """What each token counts, after the filters so far have cut at `cut` and kept `share` of the tokens there."""
    each = weights
    if not MASS:
        each = tl.full(weights.shape, 1.0, tl.float32)
    return tl.where(keys > cut, each, tl.where(keys == cut, each * share, 0.0))


@triton.jit
def _cut(
    shared, phase, most, scale, cut, share, target, MASS: tl.constexpr,
    PROGRAMS: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The largest key whose tokens, with all of larger keys, measure `target` or more."""
    logits, vocab, span = shared[0], shared[1], shared[2]
    begin, end = _mine(PROGRAMS)
    found = tl.full([], 0, tl.uint32)
    bits: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth
    unit = tl.full([], 1 << (bits - 2), tl.uint32)
    for _pass in range(bits // 2):
        for group in range(begin, end):
            one = tl.zeros([TILE // LANES, LANES], tl.float32)
            two = tl.zeros([TILE // LANES, LANES], tl.float32)
            three = tl.zeros([TILE // LANES, LANES], tl.float32)
            for start in range(group * span, tl.minimum((group + 1) * span, vocab), TILE):
                keys, weights = _keys(logits, _ids(start, LANES, TILE), vocab, most, scale)
                measure = _measure(keys, weights, cut, share, MASS)
                one += tl.where(keys >= (found | unit), measure, 0.0)
                two += tl.where(keys >= (found | (unit << 1)), measure, 0.0)
                three += tl.where(keys >= (found | unit | (unit << 1)), measure, 0.0)
            _store(shared, phase, 0, group, tl.sum(one, 1), LANES, TILE)
            _store(shared, phase, 1, group, tl.sum(two, 1), LANES, TILE)
            _store(shared, phase, 2, group, tl.sum(three, 1), LANES, TILE)
        behind = _meet(shared, phase, PROGRAMS)
        digit = (_total(shared, phase, 0, LANES, TILE) >= target).to(tl.uint32)
        digit += (_total(shared, phase, 1, LANES, TILE) >= target).to(tl.uint32)
        digit += (_total(shared, phase, 2, LANES, TILE) >= target).to(tl.uint32)
        found |= digit * unit
        unit = unit >> 2
        phase = behind
    return found, phase


@triton.jit
def _around(
    shared, phase, most, scale, pivot, cut, share, MASS: tl.constexpr,
    PROGRAMS: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The measure of the tokens above the pivot, and of those at it."""
    behind = _measure_around(shared, phase, most, scale, pivot, cut, share, MASS, PROGRAMS, LANES, TILE)
    return _total(shared, phase, 0, LANES, TILE), _total(shared, phase, 1, LANES, TILE), behind


@triton.jit
def _measure_around(
    shared, phase, most, scale, pivot, cut, share, MASS: tl.constexpr,
    PROGRAMS: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The same, of each group: the first two sums of this phase."""
    logits, vocab, span = shared[0], shared[1], shared[2]
    begin, end = _mine(PROGRAMS)
    for group in range(begin, end):
        above = tl.zeros([TILE // LANES, LANES], tl.float32)
        level = tl.zeros([TILE // LANES, LANES], tl.float32)
        for start in range(group * span, tl.minimum((group + 1) * span, vocab), TILE):
            keys, weights = _keys(logits, _ids(start, LANES, TILE), vocab, most, scale)
            measure = _measure(keys, weights, cut, share, MASS)
            above += tl.where(keys > pivot, measure, 0.0)
            level += tl.where(keys == pivot, measure, 0.0)
        _store(shared, phase, 0, group, tl.sum(above, 1), LANES, TILE)
        _store(shared, phase, 1, group, tl.sum(level, 1), LANES, TILE)
    return _meet(shared, phase, PROGRAMS)


@triton.jit
def _draw(shared, phase, most, scale, cut, ties, floor, fraction, best, PROGRAMS: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr):
    """How much of each group is kept, then which token holds `fraction` of it all; `best` if rounding leaves none. → the token, whether it
    is this program's to store, the phase."""
    logits, vocab, span = shared[0], shared[1], shared[2]
    begin, end = _mine(PROGRAMS)
    groups = tl.arange(0, GROUPS)
    at_cut = tl.zeros([GROUPS], tl.float32)         # tokens of each group
    if cut > 0:
        phase = _measure_around(shared, phase, most, scale, cut, tl.full([], 0, tl.uint32), 1.0, False, PROGRAMS, LANES, TILE)
        at_cut = _of_groups(shared, phase - 1, 1, LANES, TILE)
    for group in range(begin, end):
        total = tl.zeros([TILE // LANES], tl.float32)
        seen = tl.sum(tl.where(groups < group, at_cut, 0.0), 0)
        for start in range(group * span, tl.minimum((group + 1) * span, vocab), TILE):
            keys, weights = _keys(logits, start + tl.arange(0, TILE), vocab, most, scale)
            kept, seen = _kept(keys, weights, cut, ties, floor, seen)
            total += tl.sum(kept.reshape(TILE // LANES, LANES), 1)
        _store(shared, phase, 0, group, total, LANES, TILE)
    _meet(shared, phase, PROGRAMS)
    kept_of = _of_groups(shared, phase, 0, LANES, TILE)
    target = tl.sum(kept_of, 0) * fraction
    exceeding = tl.min(tl.where((tl.cumsum(kept_of, 0) > target) & (kept_of > 0.0), groups, GROUPS), 0)
    chosen = tl.where(exceeding < GROUPS, exceeding, tl.max(tl.where(kept_of > 0.0, groups, 0), 0))
    passed = tl.sum(tl.where(groups < chosen, kept_of, 0.0), 0)
    seen = tl.sum(tl.where(groups < chosen, at_cut, 0.0), 0)
    is_mine = (chosen >= begin) & (chosen < end)
    token = best
    is_found = not is_mine
    for start in range(chosen * span, tl.minimum((chosen + 1) * span, vocab), TILE):
        if not is_found:
            ids = start + tl.arange(0, TILE)
            keys, weights = _keys(logits, ids, vocab, most, scale)
            kept, seen = _kept(keys, weights, cut, ties, floor, seen)
            cumulative = passed + tl.cumsum(kept, 0)
            hit = tl.min(tl.where((kept > 0.0) & (cumulative > target), ids, vocab), 0)
            last = tl.max(tl.where(kept > 0.0, ids, -1), 0)         # if rounding lets no token exceed the target: the last one kept
            token = tl.where(hit < vocab, hit, tl.where(last >= 0, last, token))
            is_found = hit < vocab
            passed += tl.sum(kept, 0)
    return token, is_mine, phase + 1


@triton.jit
def _kept(keys, weights, cut, ties, floor, seen):
    """A tile's weights, 0 where a filter cut, and how many tokens at the cut there were up to its end."""
    at_cut = (keys == cut).to(tl.float32)
    rank = seen + tl.cumsum(at_cut, 0)
    stays = (keys > cut) | ((keys == cut) & (rank <= ties))
    return tl.where(stays & (weights >= floor), weights, 0.0), seen + tl.sum(at_cut, 0)
