"""CUDA graphs of one memory pool: how a capture begins, and what they leave behind without keeping its memory from the next graph."""

from typing import Any

import torch
from torch import Tensor


class _Memory:
    """Some bytes of the device, as NumPy's and CuPy's interface tells of them; who owns them is not its business."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {"data": (tensor.data_ptr(), False), "shape": (tensor.nbytes,), "typestr": "|u1", "version": 3}


def begin_capture(graph: torch.cuda.CUDAGraph, memory: Any) -> None:
    """On the current stream, with nothing under way there. Not by `torch.cuda.graph`, which empties the caches of all devices first, and
    has one stream for all: other ranks' threads may be capturing, or have kernels that wait for this rank's."""
    graph.capture_begin(pool=memory, capture_error_mode="thread_local")


def standing(result: Tensor) -> Tensor:
    """The same memory, owned by nobody: what a captured step computed lies there from a replay until another graph of its pool is replayed.
    The pool itself lives as long as its graphs do.

    Held as it is, each graph's logits would take memory of their own: 66 MB for 256 sequences of a vocabulary of 128,256.
    """
    assert result.is_contiguous(), f"strides {result.stride()} of {tuple(result.shape)}"
    return torch.as_tensor(_Memory(result), device=result.device).view(result.dtype).view(result.shape)
