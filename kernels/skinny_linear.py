"""x Wᵀ for the rows of a decode batch: the weights' bytes bound it, and each is read once.

    grid (columns / COLUMNS, split)      each program: all rows × COLUMNS outputs, over its share of K; tiles of x and W by TMA
            │ one split: writes y          │ more: partial sums
            ▼                              ▼
          y [m, n]    ◄──── sum ──── partial [splits, m, n] fp32  ────►  norms.sum_add_rms_norm

`gated`: W is [gate; up], a program computes the same columns of both and writes silu(gate) · up, rounded where `silu_mul.py` rounds.

Splitting K gives every multiprocessor work where n is small. The parts are added in the order of the splits, and how many there are
depends on shapes alone: the same inputs give the same bits, and a launch can be captured in a CUDA graph.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .overlap import after_predecessor, overlapping

MAX_ROWS = 128           # what the kernel takes
SUM_COLUMNS = 1024
MULTIPROCESSORS = 132    # of a Hopper GPU: to choose tiles by


@dataclass(frozen=True)
class LinearTile:
    """What is compiled in. columns × depth weights are a stage of the pipeline, k is cut into `splits`."""

    columns: int
    depth: int
    splits: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, m: int, n: int, k: int, gated: bool = False) -> "LinearTile":
        """The fastest on Llama-3-8B's shapes, in tests/bench/linear_sweep.py and in decode steps. All programs are on the GPU at once, or
        they would not share its bandwidth evenly: that bounds `splits`. x is read again for each tile: with many rows tiles are wide.
        """
        rows, programs = _padded(m), triton.cdiv(n, 64)
        if gated:
            return cls(128, 64, 1, 8, 4) if rows > 64 else cls(64, 128, 1, 4, 3 if rows == 16 else 2)
        if rows == 64 and programs > 2 * MULTIPROCESSORS:
            return cls(128, 64, 1, 4, 4)
        at_once = MULTIPROCESSORS * (2 if rows <= 64 else 1)
        splits = max(1, min(at_once // programs, k // 2048))
        return cls(64, 128, splits, 4, 3 if rows == 64 and programs * splits > MULTIPROCESSORS else 4)

    def share(self, k: int) -> int:
        """How much of k a split takes."""
        return int(triton.cdiv(triton.cdiv(k, self.splits), self.depth)) * self.depth


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether this kernel, rather than cuBLAS, is to take x [m, k] and weight [n, k]."""
    return takes(x, weight) and (len(x) <= 64 or len(weight) < 1 << 16)


def takes(x: Tensor, weight: Tensor) -> bool:
    """k is a multiple of 8 elements, else rows do not start where TMA copies may."""
    sixteen_bits = x.dtype is weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    contiguous = x.is_contiguous() and weight.is_contiguous()
    return sixteen_bits and contiguous and x.dim() == 2 and 1 <= len(x) <= MAX_ROWS and weight.shape[1] % 8 == 0


def skinny_linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tile: LinearTile | None = None) -> None:
    """out [m, n] = x [m, k] · weight [n, k]ᵀ + bias [n], all contiguous, m at most MAX_ROWS.

    `tile` is for measuring.
    """
    (m, n), k = out.shape, weight.shape[1]
    tile = tile or LinearTile.of(m, n, k)
    if triton.cdiv(k, tile.share(k)) == 1:
        _multiply(out, x, weight, bias, False, tile)
        return
    parts = partial_products(x, weight, tile)
    _sum_kernel[(triton.cdiv(n, SUM_COLUMNS), m)](
        out, parts, bias, m, n, SPLITS=len(parts), COLUMNS=SUM_COLUMNS, num_warps=4, **overlapping()
    )


def skinny_linear_silu_mul(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tile: LinearTile | None = None
) -> None:
    """out [m, n] = silu(gate) · up with [gate | up] = x [m, k] · weight [2n, k]ᵀ + bias [2n], all contiguous, m at most MAX_ROWS."""
    m, n = out.shape
    tile = tile or LinearTile.of(m, n, weight.shape[1], gated=True)
    assert tile.splits == 1, "the two factors must be whole where they are multiplied"
    _multiply(out, x, weight, bias, True, tile)


def partial_products(x: Tensor, weight: Tensor, tile: LinearTile | None = None) -> Tensor:
    """Parts [splits, m, n] fp32 that add up to x · weightᵀ, for whoever reads it next to add."""
    m, (n, k) = len(x), weight.shape
    tile = tile or LinearTile.of(m, n, k)
    parts = torch.empty(triton.cdiv(k, tile.share(k)), m, n, dtype=torch.float32, device=x.device)
    _multiply(parts, x, weight, None, False, tile)
    return parts


def _multiply(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, tile: LinearTile) -> None:
    (m, n), k, share = out.shape[-2:], weight.shape[1], tile.share(weight.shape[1])
    _linear_kernel[(triton.cdiv(n, tile.columns), triton.cdiv(k, share))](
        out, TensorDescriptor.from_tensor(x, [_padded(m), tile.depth]), TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]),
        bias, m, n, k, share, GATED=gated, ROWS=_padded(m), COLUMNS=tile.columns, DEPTH=tile.depth,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **overlapping(),
    )  # fmt: skip


def _padded(m: int) -> int:
    return max(16, int(triton.next_power_of_2(m)))


@triton.jit(do_not_specialize=["m"])
def _linear_kernel(
    out, x, weight, bias, m, n, k, share,
    GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    split, first = tl.program_id(1), tl.program_id(0) * COLUMNS
    start = split * share
    after_predecessor(PDL)
    accumulator = tl.zeros([COLUMNS, ROWS], tl.float32)
    ups = tl.zeros([COLUMNS, ROWS], tl.float32)
    for at in range(start, tl.minimum(start + share, k), DEPTH):
        inputs = x.load([0, at]).T
        # The weights are the left operand: the matrix instructions have 64 rows there, and as few as 8 columns.
        accumulator = tl.dot(weight.load([first, at]), inputs, accumulator)
        if GATED:
            ups = tl.dot(weight.load([n + first, at]), inputs, ups)
    rows, columns = tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    if bias is not None:
        accumulator += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[:, None]
    if GATED:
        if bias is not None:
            ups += tl.load(bias + n + columns, mask=columns < n, other=0.0).to(tl.float32)[:, None]
        gates = accumulator.to(out.dtype.element_ty).to(tl.float32)
        accumulator = gates / (1.0 + tl.exp(-gates)) * ups.to(out.dtype.element_ty).to(tl.float32)
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
