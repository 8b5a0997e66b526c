"""What CUDA graphs of one memory pool leave behind, without keeping its memory from the next graph."""

import torch
from torch import Tensor


class _Memory:
    """Some bytes of the device, as NumPy's and CuPy's interface tells of them; who owns them is not its business."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {"data": (tensor.data_ptr(), False), "shape": (tensor.nbytes,), "typestr": "|u1", "version": 3}


def standing(result: Tensor) -> Tensor:
    """The same memory, owned by nobody: what a captured step computed lies there from a replay until another graph of its pool is replayed.
    The pool itself lives as long as its graphs do.

    Held as it is, each graph's logits would take memory of their own: 66 MB for 256 sequences of a vocabulary of 128,256.
    """
    assert result.is_contiguous(), f"strides {result.stride()} of {tuple(result.shape)}"
    return torch.as_tensor(_Memory(result), device=result.device).view(result.dtype).view(result.shape)
