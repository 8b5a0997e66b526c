"""Which operations a device runs. Triton is imported for a CUDA device only: a CPU worker needs no such package."""

import torch
from torch import Tensor

from .kv_storage import FP8
from .ops import Ops, UnsupportedByKernels
from .reference import ReferenceOps


def ops_for(
    device: torch.device, head_dim: int, block_size: int, dtype: torch.dtype, kv_dtype: torch.dtype | None = None,
    kv_scales: Tensor | None = None,
) -> Ops:  # fmt: skip
    """For a KV pool of `kv_dtype` (None: `dtype`); `kv_scales` [num_layers, 2, kv_heads] are used if that is fp8. Raises
    UnsupportedByKernels if the device's kernels cannot take this shape, or if it has none."""
    kv_dtype, kv_scales = kv_dtype or dtype, kv_scales if kv_dtype is FP8 else None
    if device.type == "cpu":
        return ReferenceOps(kv_scales)
    if device.type != "cuda":
        raise UnsupportedByKernels(f"device {device}: there are kernels for cpu and cuda")
    try:
        from .triton_ops import TritonOps, check_supported
    except ModuleNotFoundError as missing:
        raise UnsupportedByKernels(f"device {device}: the kernels need the package {missing.name}") from missing
    check_supported(head_dim, block_size, dtype, kv_dtype)
    if not torch.cuda.is_available():
        raise UnsupportedByKernels(f"device {device}: torch finds no CUDA GPU here")
    return TritonOps.on(device, None if kv_scales is None else kv_scales.to(device))
