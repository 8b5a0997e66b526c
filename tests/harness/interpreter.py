"""Triton's interpreter with exact conversions and products of bf16 and fp8, for a process with TRITON_INTERPRET=1.

The interpreter keeps bf16 and fp8 as plain integers. Its own conversions lose a carry when rounding up reaches the exponent, and its dot
multiplies the integers. Elsewhere kernels must do arithmetic in fp32, as they do anyway.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}
BITS = {1: (torch.uint8, np.uint8), 2: (torch.uint16, np.uint16), 4: (torch.uint32, np.uint32)}


def make_exact() -> None:
    interpreter._convert_float = _convert
    interpreter.InterpreterBuilder.create_dot = _dot


def _convert(values: Any, source: Any, target: Any, _: Any) -> Any:
    """The bits of `values`, an array of type `source` in whatever numpy type holds it, as `target`; fp8 saturates, as on the device."""
    exact = _tensor(values, source)
    if target == tl.float8e4nv:
        exact = exact.float().clamp(-448, 448)
    converted = exact.to(TORCH[target])
    torch_bits, numpy_bits = BITS[converted.element_size()]
    return converted.view(torch_bits).numpy().view(numpy_bits)


def _dot(_: Any, a: Any, b: Any, accumulator: Any, *__: Any) -> Any:
    product = torch.matmul(_tensor(a.data, a.dtype.scalar).float(), _tensor(b.data, b.dtype.scalar).float()).numpy()
    return interpreter.TensorHandle((product + accumulator.data).astype(accumulator.data.dtype), accumulator.dtype.scalar)


def _tensor(values: Any, kind: Any) -> torch.Tensor:
    dtype = TORCH[kind]
    bits = BITS[dtype.itemsize]
    return torch.from_numpy(np.ascontiguousarray(values).view(bits[1])).view(bits[0]).view(dtype)
