"""Which operations a device gets, and what is refused before anything is allocated."""

import subprocess
import sys

import pytest
import torch

from diptych.kernels.ops import UnsupportedByKernels
from diptych.kernels.reference import ReferenceOps
from diptych.kernels.selection import ops_for

CUDA = torch.device("cuda")


def test_a_cpu_takes_the_reference_whatever_the_shape() -> None:
    assert isinstance(ops_for(torch.device("cpu"), 6, 3, torch.float32), ReferenceOps)


@pytest.mark.parametrize(
    ("head_dim", "block_size", "dtype", "told"),
    [
        (80, 64, torch.bfloat16, "head_dim 80: the CUDA kernels take 64, 96, 128, 256"),
        (128, 8, torch.bfloat16, "block_size 8: the CUDA kernels take 16, 32, 64"),
        (128, 64, torch.float64, "dtype torch.float64"),
    ],
)
def test_an_unsupported_shape_is_named(head_dim: int, block_size: int, dtype: torch.dtype, told: str) -> None:
    pytest.importorskip("triton")
    with pytest.raises(UnsupportedByKernels, match=told):
        ops_for(CUDA, head_dim, block_size, dtype)


def test_kv_of_another_type_than_the_models_is_fp8_or_nothing() -> None:
    pytest.importorskip("triton")
    with pytest.raises(UnsupportedByKernels, match=r"KV of torch.float16 for a model of torch.bfloat16: .* or torch.float8_e4m3fn"):
        ops_for(CUDA, 128, 64, torch.bfloat16, torch.float16)


def test_another_device_is_named() -> None:
    with pytest.raises(UnsupportedByKernels, match="device mps"):
        ops_for(torch.device("mps"), 128, 64, torch.float32)


def test_the_cpu_path_needs_no_triton() -> None:
    """In a process where importing it fails."""
    program = """
import sys, torch
sys.modules["triton"] = None
from diptych.kernels.selection import ops_for
from diptych.kernels.ops import UnsupportedByKernels
ops_for(torch.device("cpu"), 64, 16, torch.float32)
try:
    ops_for(torch.device("cuda"), 64, 16, torch.float32)
except UnsupportedByKernels as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "device cuda: the kernels need the package triton\n", done.stderr
