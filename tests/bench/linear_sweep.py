"""The skinny product's tiles beside cuBLAS at Llama-3-8B's shapes, on one GPU: `python tests/bench/linear_sweep.py`.

Columns are µs and TB/s of weights, the best of each marked. A measurement is one CUDA graph over copies of the weights that together
exceed the L2 cache: every product finds its weights cold. *gated* includes silu · mul, for cuBLAS as a kernel of its own. Parts of a
split product are left as they are, as the norm after it takes them.
"""

from collections.abc import Callable
from dataclasses import astuple

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench_cudagraph

from diptych.kernels.silu_mul import silu_mul
from diptych.kernels.skinny_linear import LinearTile, partial_products, skinny_linear_silu_mul

SHAPES = {"qkv": (6144, 4096), "out": (4096, 4096), "gated": (28_672, 4096), "down": (4096, 14_336), "head": (128_256, 4096)}      # n, k
ROWS = (1, 32, 64, 128)
COLD_BYTES = 512 * 2**20
NARROW = [(64, 128, 4), (64, 128, 3), (64, 128, 2), (64, 64, 6), (128, 64, 4)]      # columns, depth, stages; 4 warps
WIDE = [(128, 64, 4), (128, 128, 2)]                                        # 8 warps
SPLITS = {"qkv": (1, 2), "out": (2, 3, 4), "gated": (1,), "down": (2, 3, 4), "head": (1,)}


def time_us(product: Callable[[Tensor, Tensor], object], x: Tensor, weights: list[Tensor]) -> float:
    def round_trip() -> None:
        for weight in weights:
            product(x, weight)

    return 1e3 * float(do_bench_cudagraph(round_trip, rep=10, return_mode="median")) / len(weights)


def cublas(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    def gated(x: Tensor, weight: Tensor) -> Tensor:
        out = torch.empty(len(x), len(weight) // 2, dtype=x.dtype, device=x.device)
        silu_mul(out, F.linear(x, weight))
        return out

    return gated if name == "gated" else F.linear


def with_tile(name: str, tile: LinearTile) -> Callable[[Tensor, Tensor], Tensor]:
    def gated(x: Tensor, weight: Tensor) -> Tensor:
        out = torch.empty(len(x), len(weight) // 2, dtype=x.dtype, device=x.device)
        skinny_linear_silu_mul(out, x, weight, None, tile=tile)
        return out

    return gated if name == "gated" else lambda x, weight: partial_products(x, weight, tile=tile)


def measured(m: int, weights: list[Tensor], product: Callable[[Tensor, Tensor], Tensor]) -> float:
    """µs; infinity: it does not fit."""
    x = torch.randn(m, weights[0].shape[1], device="cuda", dtype=torch.bfloat16)
    try:
        product(x, weights[0])
    except OutOfResources:
        return float("inf")
    return time_us(product, x, weights)


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; m = {ROWS}")
    for name, (n, k) in SHAPES.items():
        weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(-(-COLD_BYTES // (2 * n * k)))]
        shapes = [(*shape, 4) for shape in NARROW] + [(*shape, 8) for shape in WIDE]
        tiles = [LinearTile(columns, depth, splits, warps, stages) for splits in SPLITS[name] for columns, depth, stages, warps in shapes]
        rows = {"cuBLAS": cublas(name)} | {str(astuple(tile)): with_tile(name, tile) for tile in tiles}
        times = {label: [measured(m, weights, product) for m in ROWS] for label, product in rows.items()}
        best = [min(column) for column in zip(*times.values(), strict=True)]
        for label, column in times.items():
            marks = ["*" if us == least else " " for us, least in zip(column, best, strict=True)]
            cells = [f"{us:6.1f} {weights[0].nbytes / us / 1e6:.2f}{mark}" for us, mark in zip(column, marks, strict=True)]
            print(" | ".join(cells) + f" | {name} {n}x{k} {label}", flush=True)


if __name__ == "__main__":
    main()
