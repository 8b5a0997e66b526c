"""RMSNorm (Zhang & Sennrich, arXiv 1910.07467), by itself and with the addition of the residual before it.

A program holds its rows whole in registers, so every element is read once and written once: 4 bytes an element for the norm in bf16,
8 with the residual. Rounding is that of the reference: the sum to the input's type before it is normed, the normed row before the weight.

What is added to the residual may come as the parts of a product (`skinny_linear.py`), added here in their order and rounded as the product
would have been.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl
from torch import Tensor

from .overlap import after_predecessor, overlapping

ELEMENTS_PER_PROGRAM = 2048       # short rows (a head's q or k) share a program
COLUMNS_OF_A_WARP = 256


def rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """out, x [rows, n], weight [n]; n contiguous, out may be x."""
    _launch(out, x, x, weight, eps, add=False)


def add_rms_norm(out: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """residual += x, then out = rms_norm(residual): all [rows, n], weight [n]; n contiguous, out may be x."""
    _launch(out, x, residual, weight, eps, add=True)


def sum_add_rms_norm(out: Tensor, parts: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> None:
    """add_rms_norm of x = parts[0] + parts[1] + … + bias, rounded to out's type: parts [any number, rows, n] fp32, contiguous, bias [n]."""
    _launch(out, parts, residual, weight, eps, add=True, bias=bias, parts=len(parts))


def _launch(
    out: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, add: bool, bias: Tensor | None = None, parts: int = 1
) -> None:
    num_rows, n = out.shape
    width = triton.next_power_of_2(n)
    rows = max(1, ELEMENTS_PER_PROGRAM // width)
    _norm_kernel[(triton.cdiv(num_rows, rows),)](
        out, x, bias, residual, weight, num_rows, eps, out.stride(0), x.stride(-2), residual.stride(0),
        ADD=add, PARTS=parts, ROWS=rows, N=n, WIDTH=width, num_warps=min(16, max(4, width // COLUMNS_OF_A_WARP)), **overlapping(),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _norm_kernel(
    out, x, bias, residual, weight, num_rows, eps, out_stride, x_stride, residual_stride,
    ADD: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    after_predecessor(PDL)
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    there = (rows < num_rows) & (columns < N)
    wide = tl.load(x + rows * x_stride + columns, mask=there, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        wide += tl.load(x + (part * num_rows + rows) * x_stride + columns, mask=there, other=0.0)
    if bias is not None:
        wide += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)
    wide = wide.to(out.dtype.element_ty).to(tl.float32)
    if ADD:
        wide += tl.load(residual + rows * residual_stride + columns, mask=there, other=0.0).to(tl.float32)
        total = wide.to(out.dtype.element_ty)
        tl.store(residual + rows * residual_stride + columns, total, mask=there)
        wide = total.to(tl.float32)
    variance = tl.sum(wide * wide, 1) / N
    normed = (wide * tl.rsqrt(variance + eps)[:, None]).to(out.dtype.element_ty).to(tl.float32)
    normed *= tl.load(weight + columns, mask=columns < N, other=0.0).to(tl.float32)
    tl.store(out + rows * out_stride + columns, normed.to(out.dtype.element_ty), mask=there)
