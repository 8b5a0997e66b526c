"""The skinny product's tiles beside cuBLAS at Llama-3-8B's shapes, on one GPU: `python tests/bench/linear_sweep.py`.

Columns are µs and TB/s of weights. A measurement is one CUDA graph over copies of the weights that together exceed the L2 cache:
every product finds its weights cold.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench_cudagraph

from diptych.kernels.skinny_linear import LinearTile, skinny_linear

SHAPES = {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28_672, 4096), "down": (4096, 14_336)}      # n, k
ROWS = (1, 8, 16, 32, 64)
COLD_BYTES = 512 * 2**20
TILES = {
    6144: [(64, 128, 1, 4, 4), (64, 128, 4, 4, 4), (32, 256, 2, 4, 4), (64, 256, 2, 4, 3), (128, 64, 4, 4, 5)],
    4096: [(64, 128, 4, 4, 4), (64, 128, 8, 4, 4), (32, 256, 2, 4, 4), (32, 256, 4, 4, 4), (128, 64, 8, 4, 5)],
    28_672: [(64, 128, 1, 4, 4), (64, 256, 1, 4, 3), (32, 256, 1, 4, 4), (128, 64, 1, 4, 5), (128, 128, 2, 8, 4)],
}


def time_us(product: Callable[[Tensor, Tensor], object], x: Tensor, weights: list[Tensor]) -> float:
    def round_trip() -> None:
        for weight in weights:
            product(x, weight)

    return 1e3 * float(do_bench_cudagraph(round_trip, rep=15, return_mode="median")) / len(weights)


def measured(name: str, product: Callable[[Tensor, Tensor], Tensor], weights: list[Tensor]) -> str:
    """A column for each number of rows; the product is checked before it is timed."""
    columns = []
    for m in ROWS:
        try:
            x = torch.randn(m, weights[0].shape[1], device="cuda", dtype=torch.bfloat16)
            exact = x.double() @ weights[0].double().T
            error = float((product(x, weights[0]).double() - exact).norm() / exact.norm())
            assert error < 1e-2, f"error {error:.1e}"
            us = time_us(product, x, weights)
            columns.append(f"{us:6.1f} {weights[0].nbytes / us / 1e6:.2f}")
        except Exception as failure:      # one that does not fit must not hide the others
            columns.append(f"{type(failure).__name__[:11]:>11}")
    return " | ".join(columns) + f" | {name}"


def with_tile(tile: LinearTile) -> Callable[[Tensor, Tensor], Tensor]:
    def product(x: Tensor, weight: Tensor) -> Tensor:
        out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
        skinny_linear(out, x, weight, None, tile)
        return out

    return product


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; m = {ROWS}")
    for shape, (n, k) in SHAPES.items():
        weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(-(-COLD_BYTES // (2 * n * k)))]
        print(measured(f"{shape} {n}x{k} cuBLAS", F.linear, weights), flush=True)
        for tile in TILES[n]:
            print(measured(str(tile), with_tile(LinearTile(*tile)), weights), flush=True)


if __name__ == "__main__":
    main()
