"""Decode attention's splits and tiles on one GPU: `python tests/bench/decode_sweep.py [batch:context ...]`.

Llama-3-8B's heads, block tables for contexts of 16k. Rows are tiles, columns numbers of splits, entries µs of attention and merge; the best
is also given in TB/s of keys and values. A measurement is one CUDA graph over layers of a pool that together exceed the L2 cache: every
layer finds its keys and values cold.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import torch
from triton.testing import do_bench_cudagraph

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.kernel_checks import AttentionCase, Device, attention_inputs, expected_attention, relative_error

from diptych.kernels.context_shares import most_shares, share_tokens
from diptych.kernels.decode_attention import DecodeTile, decode_attention, with_share_list
from diptych.kernels.ops import Paging

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, MAX_CONTEXT = 32, 8, 128, 64, 16_384
SCALE = HEAD_DIM**-0.5
SHAPES = ((1, 1024), (1, 16_000), (8, 1024), (32, 1024), (64, 1024), (64, 4096), (128, 1024), (256, 1024))
SPLITS = (1, 2, 3, 4, 6, 8, 16, 32, 64)
TILES = tuple(DecodeTile(*tile) for tile in ((64, 4, 5), (64, 2, 5), (64, 4, 4), (64, 2, 4), (128, 8, 4), (32, 4, 8)))
PROGRAMS = (64, 8192)      # fewer do not fill a GPU, more are only overhead
COLD_BYTES = 400 * 2**20


def error_of(tile: DecodeTile) -> float:
    case = AttentionCase(((1, 1000), (1, 64), (1, 0), (1, 777)), (HEADS, KV_HEADS), HEAD_DIM, BLOCK_SIZE, dtype=torch.bfloat16)
    inputs = attention_inputs(case, Device.fresh("cuda"))
    errors = []
    for splits in (1, 3):
        out = torch.full_like(inputs.q.contiguous(), torch.nan)
        decode_attention(out, inputs.q, inputs.kv_pool, inputs.layer, inputs.paging, case.scale, None, None, splits, tile)
        errors.append(relative_error(out, expected_attention(case, inputs)))
    return max(errors)


class Batch:
    """One decode for each context, their blocks shuffled through a pool of so many layers, or as many as it takes to leave the cache."""

    def __init__(self, contexts: Sequence[int], layers: int | None = None, share: int | None = None) -> None:
        """`share`: tokens of one, as the host says for a step; None: every context is cut into all splits."""
        batch, blocks = len(contexts), [-(-context // BLOCK_SIZE) for context in contexts]
        self.layer_bytes = 2 * 2 * sum(contexts) * KV_HEADS * HEAD_DIM
        self.layers = layers or max(2, -(-COLD_BYTES // self.layer_bytes))
        shape = (sum(blocks), self.layers, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        self.pool = torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_()
        tables = torch.zeros(batch, MAX_CONTEXT // BLOCK_SIZE, dtype=torch.int32, device="cuda")
        for table, ids in zip(tables, torch.randperm(sum(blocks), device="cuda").split(blocks), strict=True):
            table[: len(ids)] = ids
        starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        share_tokens = None if share is None else torch.tensor([share], dtype=torch.int32, device="cuda")
        self.paging = Paging(starts, torch.tensor(contexts, dtype=torch.int32, device="cuda"), tables, share_tokens=share_tokens)
        self.q = torch.randn(batch, HEADS + 2 * KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)[:, :HEADS]
        self.out = torch.empty(batch, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

    def time_us(self, splits: int, tile: DecodeTile | None = None) -> float:
        """Of a layer; the list of shares, which a step makes once, is a part of it."""
        num_sms = torch.cuda.get_device_properties(0).multi_processor_count

        def round_trip() -> None:
            paging = with_share_list(self.paging, KV_HEADS, splits, num_sms)
            for layer in range(self.layers):
                decode_attention(self.out, self.q, self.pool, layer, paging, SCALE, None, None, splits, tile, num_sms)

        return 1e3 * float(do_bench_cudagraph(round_trip, rep=10, return_mode="median")) / self.layers


def sensible_splits(batch: int, context: int, served: int) -> list[int]:
    fewest, most = PROGRAMS
    pairs = batch * KV_HEADS
    chosen = {splits for splits in SPLITS if fewest <= pairs * splits <= most and splits * 32 <= context}
    return sorted(chosen | {served})


def measure(batch: int, context: int, tiles: list[DecodeTile], num_sms: int) -> None:
    shares = math.ceil(context / share_tokens([context] * batch, KV_HEADS, num_sms))
    inputs, served = Batch([context] * batch), min(shares, most_shares(batch, KV_HEADS, MAX_CONTEXT, num_sms))
    columns = sensible_splits(batch, context, served)
    print(f"\nb {batch}, context {context}, now {served} splits")
    print(f"{'tile':>12}" + "".join(f"{splits:>7}" for splits in columns))
    best = (float("inf"), 0, tiles[0])
    for tile in tiles:
        cells = []
        for splits in columns:
            try:
                us = inputs.time_us(splits, tile)
                best = min(best, (us, splits, tile), key=lambda found: found[0])
                cells.append(f"{us:7.1f}")
            except Exception as failure:      # one that does not fit must not hide the others
                cells.append(f"{type(failure).__name__[:6]:>7}")
        print(f"{astuple(tile)!s:>12}" + "".join(cells), flush=True)
    us, splits, tile = best
    print(f"best: {us:.1f} µs, {inputs.layer_bytes / us / 1e6:.2f} TB/s, {splits} splits, {tile}", flush=True)


def main() -> None:
    started = time.monotonic()
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    print(f"{torch.cuda.get_device_name()}, {num_sms} multiprocessors, torch {torch.__version__}")
    right = []
    for tile in TILES:
        try:
            error = error_of(tile)
            assert error < 1e-2, f"error {error:.1e}"
            right.append(tile)
        except Exception as failure:
            print(f"{type(failure).__name__}: {str(failure)[-160:]!r}  {tile}", flush=True)
    shapes = [(int(batch), int(context)) for batch, context in (shape.split(":") for shape in sys.argv[1:])]
    for batch, context in shapes or SHAPES:
        measure(batch, context, right, num_sms)
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
