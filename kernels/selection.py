"""Which operations a device runs. Triton is imported for a CUDA device only: a CPU worker needs no such package."""

import torch

from .ops import Ops, UnsupportedByKernels
from .reference import ReferenceOps


def ops_for(device: torch.device, head_dim: int, block_size: int, dtype: torch.dtype) -> Ops:
    """Raises UnsupportedByKernels if the device's kernels cannot take this shape, or if it has none."""
    if device.type == "cpu":
        return ReferenceOps()
    if device.type != "cuda":
        raise UnsupportedByKernels(f"device {device}: there are kernels for cpu and cuda")
    try:
        from .triton_ops import TritonOps, check_supported
    except ModuleNotFoundError as missing:
        raise UnsupportedByKernels(f"device {device}: the kernels need the package {missing.name}") from missing
    check_supported(head_dim, block_size, dtype)
    if not torch.cuda.is_available():
        raise UnsupportedByKernels(f"device {device}: torch finds no CUDA GPU here")
    return TritonOps.on(device)
