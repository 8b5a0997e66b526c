"""Biases, penalties and masks, on the device: rows of logits in, changed rows in fp32 out. Meanings as in `engine/sampler.py`.

    logits [R, vocab] ──► change_logits ──► changed [S, vocab] ──► sampling.sample ──► settle ──► sampled [R]
                              ▲                                                          │
                              └────────────── counts [slots, vocab] ◄────────────────────┘ + 1

What penalties go by (`token_counts.py`) stays on the device, since a step begins before the host knows the token of the step before.
Nothing here is in a CUDA graph: only few steps have such rows, and theirs are drawn a second time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap import after_predecessor, overlapping
from .token_counts import MOST_COUNTED

TILE = 4096
NUM_WARPS = 8
BIASES = 128    # that are added at once


@dataclass(frozen=True)
class LogitChanges:
    """What is done to S rows, in this order: biases added, the repetition penalty, presence and frequency penalties."""

    rows: Tensor           # [S] int32: of the logits
    slots: Tensor          # [S] int32: of the counts; -1: nothing goes by them
    repetition: Tensor     # [S] fp32, > 0
    presence: Tensor       # [S] fp32
    frequency: Tensor      # [S] fp32
    bias_starts: Tensor    # [S + 1] int32
    bias_ids: Tensor       # [E] int32: row s has those from bias_starts[s] to bias_starts[s + 1], distinct
    biases: Tensor         # [E] fp32; -inf: masked


def change_logits(logits: Tensor, counts: Tensor, changes: LogitChanges, tile: int = TILE) -> Tensor:
    """logits [R, vocab] of any type, counts [slots, vocab] int16 → changed [S, vocab] fp32."""
    num_rows, vocab = len(changes.rows), logits.shape[1]
    changed = torch.empty(num_rows, vocab, dtype=torch.float32, device=logits.device)
    penalties = changes.repetition, changes.presence, changes.frequency
    inputs = changed, logits, counts, changes.rows, changes.slots, *penalties
    _penalise_kernel[(num_rows, triton.cdiv(vocab, tile))](
        *inputs, vocab, logits.stride(0), TILE=tile, num_warps=NUM_WARPS, **overlapping()
    )  # fmt: skip
    if len(changes.biases):
        _bias_kernel[(num_rows,)](
            *inputs, changes.bias_starts, changes.bias_ids, changes.biases, vocab, logits.stride(0),
            TILE=BIASES, num_warps=4, **overlapping(),
        )  # fmt: skip
    return changed


def settle(sampled: Tensor, tokens: Tensor, counts: Tensor, changes: LogitChanges) -> None:
    """Puts `tokens` [S] int64 in their rows of `sampled` [R] int64, and counts them. A row of `sampled` that is -1 (its logits were no
    numbers) stays so."""
    _settle_kernel[(len(tokens),)](
        sampled, tokens, counts, changes.rows, changes.slots, counts.shape[1], MOST=MOST_COUNTED, num_warps=1, **overlapping()
    )


@triton.jit
def _penalise_kernel(
    changed, logits, counts, rows, slots, repetition, presence, frequency, vocab, row_stride, TILE: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Grid (row, tile of the vocabulary). As if there were no biases."""
    after_predecessor(PDL)
    at = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = ids < vocab
    values = tl.load(logits + tl.load(rows + at).to(tl.int64) * row_stride + ids, mask=there, other=0.0).to(tl.float32)
    values = _penalised(values, ids, there, counts, slots + at, repetition + at, presence + at, frequency + at, vocab)
    tl.store(changed + at * vocab + ids, values, mask=there)


@triton.jit
def _bias_kernel(
    changed, logits, counts, rows, slots, repetition, presence, frequency, bias_starts, bias_ids, biases, vocab, row_stride,
    TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid row: the tokens that have biases once more, with them."""
    after_predecessor(PDL)
    at = tl.program_id(0).to(tl.int64)
    logits += tl.load(rows + at).to(tl.int64) * row_stride
    end = tl.load(bias_starts + at + 1)
    for start in range(tl.load(bias_starts + at), end, TILE):
        places = start + tl.arange(0, TILE)
        ids = tl.load(bias_ids + places, mask=places < end, other=vocab)
        there = ids < vocab                   # a stop token may be one that the model cannot sample
        values = tl.load(logits + ids, mask=there, other=0.0).to(tl.float32) + tl.load(biases + places, mask=there, other=0.0)
        values = _penalised(values, ids, there, counts, slots + at, repetition + at, presence + at, frequency + at, vocab)
        tl.store(changed + at * vocab + ids, values, mask=there)


@triton.jit
def _penalised(values, ids, there, counts, slot_of, repetition, presence, frequency, vocab):
    slot = tl.load(slot_of).to(tl.int64)
    if slot >= 0:
        count = tl.load(counts + slot * vocab + ids, mask=there, other=0).to(tl.int32)
        times = (count & 0x7FFF).to(tl.float32)
        factor = tl.load(repetition)
        punished = tl.where(values > 0.0, values / factor, values * factor)
        values = tl.where(count != 0, punished, values)
        values = tl.where(times > 0.0, values - (tl.load(presence) + tl.load(frequency) * times), values)
    return values


@triton.jit
def _settle_kernel(sampled, tokens, counts, rows, slots, vocab, MOST: tl.constexpr, PDL: tl.constexpr):
    after_predecessor(PDL)
    at = tl.program_id(0).to(tl.int64)
    target = sampled + tl.load(rows + at)
    if tl.load(target) >= 0:
        token = tl.load(tokens + at)
        tl.store(target, token)
        slot = tl.load(slots + at).to(tl.int64)
        if slot >= 0:
            count = tl.load(counts + slot * vocab + token)
            more = (count & 0x7FFF) < MOST
            tl.store(counts + slot * vocab + token, tl.where(more, count + 1, count).to(tl.int16))
