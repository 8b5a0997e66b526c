"""What a KV pool holds of a key or a value: the number, rounded to the pool's type; in fp8 the number divided by its head's scale."""

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def stored(values: Tensor, dtype: torch.dtype, scales: Tensor | None) -> Tensor:
    """As `dtype`; fp8 saturates. `scales`, of fp8 alone, broadcast against `values`; None for 1."""
    if dtype is FP8:
        values = (values.float() if scales is None else values.float() / scales).clamp(-FP8_MAX, FP8_MAX)
    return values.to(dtype)


def loaded(kept: Tensor, dtype: torch.dtype, scales: Tensor | None) -> Tensor:
    """What `stored` was given, as `dtype`, up to rounding."""
    if kept.dtype is FP8 and scales is not None:
        kept = kept.float() * scales
    return kept.to(dtype)
