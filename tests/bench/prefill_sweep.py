"""Prefill attention's tiles beside cuDNN, on one GPU: `python tests/bench/prefill_sweep.py`. TFLOP/s, causal, one prompt of 32 / 8 heads.
With `chunks` instead: µs of chunks of few tokens against cached contexts, uncut and cut into shares of at least so many keys.

Each tile is checked first, on chunks that end inside a page of NaN. One CUDA graph a measurement, so that the host's time is not in it.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench_cudagraph

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.kernel_checks import AttentionCase, Device, attention_inputs, expected_attention, relative_error

from diptych.kernels.context_shares import ChunkCut
from diptych.kernels.ops import Paging
from diptych.kernels.prefill_attention import PrefillTile, prefill_attention

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 64
SCALE = HEAD_DIM**-0.5
CHUNKS, CACHED = (16, 32, 64, 128, 256), (2048, 8192, 16_384)
CUTS = {"uncut": ChunkCut(0), "as served": None} | {f">= {keys}": ChunkCut(33, keys) for keys in (256, 1024)}
BESIDE = 40                 # decodes, whose rows are passed over
COLD_BYTES = 200 * 2**20
LENGTHS = (1024, 2048, 8192, 16_384)
TILES = (
    PrefillTile(128, 64, 8, 3),
    PrefillTile(128, 64, 8, 2, pages=1),
    PrefillTile(128, 64, 8, 3, pages=1),
    PrefillTile(128, 64, 8, 4, pages=1),
    PrefillTile(128, 64, 8, 2, pages=1, max_registers=128),
    PrefillTile(128, 64, 8, 2, pages=2),
    PrefillTile(128, 64, 8, 3, pages=2),
    PrefillTile(64, 64, 4, 2, pages=1),
    PrefillTile(64, 64, 4, 2, pages=2),
    PrefillTile(128, 64, 4, 3, pages=1),
    PrefillTile(256, 64, 16, 3, pages=1),
)


def tflops(run: Callable[[], object], length: int) -> float:
    return 2 * length**2 * HEAD_DIM * HEADS / float(do_bench_cudagraph(run, rep=60, return_mode="median")) / 1e9


def error_of(tile: PrefillTile) -> float:
    case = AttentionCase(((700, 0), (129, 1000), (64, 64), (2, 0)), (HEADS, KV_HEADS), HEAD_DIM, BLOCK_SIZE, dtype=torch.bfloat16)
    inputs = attention_inputs(case, Device.fresh("cuda"))
    out = torch.full_like(inputs.q.contiguous(), torch.nan)
    prefill_attention(out, inputs.q, inputs.kv_pool, inputs.layer, inputs.paging, case.scale, None, None, tile)
    return relative_error(out, expected_attention(case, inputs))


def ours(tile: PrefillTile, length: int) -> float:
    num_blocks = length // BLOCK_SIZE
    pool = torch.randn(num_blocks, 1, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    starts, contexts = (torch.tensor(values, dtype=torch.int32, device="cuda") for values in ([0, length], [length]))
    paging = Paging(starts, contexts, torch.randperm(num_blocks, device="cuda").to(torch.int32).view(1, -1))
    q = torch.randn(length, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(q)
    return tflops(lambda: prefill_attention(out, q, pool, 0, paging, SCALE, None, None, tile), length)


def cudnn(length: int) -> float:
    heads = torch.randn(3, 1, HEADS, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return tflops(lambda: torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True), length)


def row(name: str, measure: Callable[[int], float]) -> str:
    return " ".join(f"{measure(length):6.0f}" for length in LENGTHS) + f"  {name}"


class Chunk:
    """The last tokens of a prompt, in a pool of as many layers as it takes to leave the cache: each layer finds its keys cold."""

    def __init__(self, tokens: int, cached: int, beside: int) -> None:
        num_blocks = -(-(tokens + cached) // BLOCK_SIZE)
        self.layers = max(2, COLD_BYTES // (num_blocks * 2 * KV_HEADS * BLOCK_SIZE * HEAD_DIM * 2))
        shape = (num_blocks, self.layers, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        self.pool = torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_()
        rows, contexts = [1] * beside + [tokens], [cached] * beside + [tokens + cached]
        starts = torch.tensor([0, *rows], device="cuda").cumsum(0).to(torch.int32)
        tables = torch.randperm(num_blocks, device="cuda").to(torch.int32).repeat(len(rows), 1)
        self.paging = Paging(starts, torch.tensor(contexts, dtype=torch.int32, device="cuda"), tables, has_single_rows=beside > 0)
        self.q = torch.randn(sum(rows), HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        self.out = torch.empty_like(self.q)

    def time_us(self, cut: ChunkCut | None) -> float:
        def round_trip() -> None:
            for layer in range(self.layers):
                prefill_attention(self.out, self.q, self.pool, layer, self.paging, SCALE, None, None, cut=cut)

        return 1e3 * float(do_bench_cudagraph(round_trip, rep=10, return_mode="median")) / self.layers


def chunks() -> None:
    for beside in (0, BESIDE):
        print(f"\nbeside {beside} decodes\n{'tokens':>6} {'cached':>6} " + " ".join(f"{name:>9}" for name in CUTS))
        for tokens in CHUNKS:
            for cached in CACHED if beside == 0 else CACHED[1:2]:
                chunk = Chunk(tokens, cached, beside)
                print(f"{tokens:6} {cached:6} " + " ".join(f"{chunk.time_us(cut):9.1f}" for cut in CUTS.values()), flush=True)


def main() -> None:
    if "chunks" in sys.argv[1:]:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        chunks()
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; s = {LENGTHS}")
    print(row("cuDNN", cudnn), flush=True)
    for tile in TILES:
        try:
            error = error_of(tile)
            assert error < 1e-2, f"error {error:.1e}"
            print(row(str(tile), lambda length, tile=tile: ours(tile, length)), flush=True)
        except Exception as failure:      # one that does not compile must not hide the others
            print(f"{type(failure).__name__}: {str(failure)[-160:]!r}  {tile}", flush=True)


if __name__ == "__main__":
    main()
