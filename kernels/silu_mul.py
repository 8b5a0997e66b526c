"""SwiGLU's product (Shazeer, arXiv 2002.05202): silu(gate) · up of [gate | up], read once and written once, in fp32 between."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl
from torch import Tensor

from .overlap import after_predecessor, overlapping

COLUMNS = 1024


def silu_mul(out: Tensor, gate_up: Tensor) -> None:
    """out [rows, n], gate_up [rows, 2n]; the last dimension is contiguous."""
    num_rows, n = out.shape
    _silu_mul_kernel[(num_rows, triton.cdiv(n, COLUMNS))](
        out, gate_up, n, out.stride(0), gate_up.stride(0), COLUMNS=COLUMNS, num_warps=4, **overlapping()
    )


@triton.jit
def _silu_mul_kernel(out, gate_up, n, out_stride, gate_up_stride, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    after_predecessor(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = columns < n
    gate = tl.load(gate_up + row * gate_up_stride + columns, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_stride + n + columns, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + columns, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=there)
