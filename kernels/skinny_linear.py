"""x Wᵀ for the few rows of a decode batch: the weights' bytes bound it, and each is read once.

    grid (columns / COLUMNS, split)      each program: all rows × COLUMNS outputs, over its share of K
            │ one split: writes y          │ more: partial sums
            ▼                              ▼
          y [m, n]    ◄──── sum ──── partial [splits, m, n] fp32  ────►  norms.sum_add_rms_norm

With `gated`, x is [gate | up] and silu(gate) · up, rounded as `silu_mul.py` rounds it, is what is multiplied.

Splitting K gives every multiprocessor work where n is small. The parts are added in the order of the splits, and how many there are
depends on shapes alone: the same inputs give the same bits, and a launch can be captured in a CUDA graph.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap import after_predecessor, overlapping

MAX_ROWS = 64            # what the kernel takes
SERVED_ROWS = 16         # up to here it is used instead of cuBLAS
SUM_COLUMNS = 1024


@dataclass(frozen=True)
class LinearTile:
    """What is compiled in. columns × depth weights are a stage of the pipeline, k is cut into `splits`."""

    columns: int
    depth: int
    splits: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, n: int, k: int) -> "LinearTile":
        """Four stages of 16 KiB each: 32 KiB a multiprocessor must be in flight to saturate HBM3e. K is split where fewer programs than
        three quarters of an H100's multiprocessors would be left: fastest on Llama-3-8B's shapes (tests/bench/linear_sweep.py).
        """
        columns, depth = 64, 128
        programs = triton.cdiv(n, columns)
        splits = 1 if programs >= 96 else max(1, min(256 // programs, k // (8 * depth)))
        return cls(columns, depth, splits, num_warps=4, num_stages=4)

    def share(self, k: int) -> int:
        """How much of k a split takes."""
        return int(triton.cdiv(triton.cdiv(k, self.splits), self.depth)) * self.depth


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether this kernel, rather than cuBLAS, is to take x [m, k], or gated [m, 2k], and weight [n, k]."""
    return len(x) <= SERVED_ROWS and takes(x, weight)


def takes(x: Tensor, weight: Tensor) -> bool:
    """k is a multiple of 16 elements, else rows do not start where 16-byte copies may."""
    sixteen_bits = x.dtype is weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    contiguous = x.is_contiguous() and weight.is_contiguous()
    return sixteen_bits and contiguous and x.dim() == 2 and 1 <= len(x) <= MAX_ROWS and weight.shape[1] % 16 == 0


def skinny_linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tile: LinearTile | None = None) -> None:
    """out [m, n] = x [m, k] · weight [n, k]ᵀ + bias [n], all contiguous, m at most MAX_ROWS. `tile` is for measuring."""
    m, n = out.shape
    tile = tile or LinearTile.of(*weight.shape)
    splits = triton.cdiv(weight.shape[1], tile.share(weight.shape[1]))
    if splits == 1:
        _multiply(out, x, weight, bias, False, tile)
        return
    parts = partial_products(x, weight, tile=tile)
    _sum_kernel[(triton.cdiv(n, SUM_COLUMNS), m)](out, parts, bias, m, n, SPLITS=splits, COLUMNS=SUM_COLUMNS, num_warps=4, **overlapping())


def partial_products(x: Tensor, weight: Tensor, gated: bool = False, tile: LinearTile | None = None) -> Tensor:
    """Parts [splits, m, n] fp32 that add up to x · weightᵀ, for whoever reads it next to add."""
    n, k = weight.shape
    tile = tile or LinearTile.of(n, k)
    parts = torch.empty(triton.cdiv(k, tile.share(k)), len(x), n, dtype=torch.float32, device=x.device)
    _multiply(parts, x, weight, None, gated, tile)
    return parts


def _multiply(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, tile: LinearTile) -> None:
    m, (n, k), share = len(x), weight.shape, tile.share(weight.shape[1])
    _linear_kernel[(triton.cdiv(n, tile.columns), triton.cdiv(k, share))](
        out, x, weight, bias, m, n, k, share, GATED=gated,
        ROWS=max(16, triton.next_power_of_2(m)), COLUMNS=tile.columns, DEPTH=tile.depth, EVEN=k % share == 0 and n % tile.columns == 0,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **overlapping(),
    )  # fmt: skip


@triton.jit(do_not_specialize=["m"])
def _linear_kernel(
    out, x, weight, bias, m, n, k, share, GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """EVEN: tiles of weights never reach past n or a share's end."""
    split = tl.program_id(1)
    rows, columns = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depths = tl.arange(0, DEPTH)
    start = split * share
    x_places = x + rows[:, None] * (2 * k if GATED else k) + depths[None, :]
    weight_places = weight + columns.to(tl.int64)[:, None] * k + depths[None, :]
    after_predecessor(PDL)
    accumulator = tl.zeros([COLUMNS, ROWS], tl.float32)
    for at in range(start, tl.minimum(start + share, k), DEPTH):
        if EVEN:
            given = (rows < m)[:, None]
            weights = tl.load(weight_places + at)
        else:
            there = at + depths < k
            given = (rows < m)[:, None] & there[None, :]
            weights = tl.load(weight_places + at, mask=(columns < n)[:, None] & there[None, :], other=0.0)
        inputs = tl.load(x_places + at, mask=given, other=0.0)
        if GATED:
            gate, up = inputs.to(tl.float32), tl.load(x_places + k + at, mask=given, other=0.0).to(tl.float32)
            inputs = (gate / (1.0 + tl.exp(-gate)) * up).to(x.dtype.element_ty)
        # The weights are the left operand: the matrix instructions have 16 or 64 rows there, and only 8 columns.
        accumulator = tl.dot(weights, inputs.T, accumulator)
    if bias is not None:
        accumulator += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[:, None]
    places = out + (split * m + rows[None, :]).to(tl.int64) * n + columns[:, None]
    tl.store(places, accumulator.to(out.dtype.element_ty), mask=(columns < n)[:, None] & (rows < m)[None, :])


@triton.jit(do_not_specialize=["m"])
def _sum_kernel(out, partial, bias, m, n, SPLITS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    after_predecessor(PDL)
    row, columns = tl.program_id(1), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = columns < n
    total = tl.zeros([COLUMNS], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + (split * m + row) * n + columns, mask=there, other=0.0)
    if bias is not None:
        total += tl.load(bias + columns, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * n + columns, total.to(out.dtype.element_ty), mask=there)
