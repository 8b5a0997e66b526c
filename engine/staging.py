"""Host to device without a wait: pinned buffers in turn, one copy a step.

A buffer comes up again DEPTH steps later. With at most two steps under way, the copy that read it has long been made then.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

DEPTH = 3
ALIGNMENT = 16           # bytes


class Staging:
    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._device = device
        self.buffers = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(DEPTH)]
        self.turn = 0

    def next(self) -> torch.Tensor:
        """The buffer whose turn it is: uint8, pinned."""
        self.turn = (self.turn + 1) % DEPTH
        return self.buffers[self.turn]

    def upload(self, arrays: Sequence[NDArray[Any]]) -> list[torch.Tensor]:
        """All arrays in one copy, queued on the current stream → their twins on the device, views of one new tensor."""
        starts, end = [], 0
        for array in arrays:
            starts.append(end)
            end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        buffer = self._buffer_for(end)
        host = buffer.numpy()
        for start, array in zip(starts, arrays, strict=True):
            host[start : start + array.nbytes].view(array.dtype)[:] = array.reshape(-1)
        there = buffer[:end].to(self._device, non_blocking=True)
        return [
            there[start : start + array.nbytes].view(_torch_type(array)).view(array.shape)
            for start, array in zip(starts, arrays, strict=True)
        ]

    def _buffer_for(self, num_bytes: int) -> torch.Tensor:
        buffer = self.next()
        if num_bytes > len(buffer):
            self.buffers[self.turn] = buffer = torch.empty(2 * num_bytes, dtype=torch.uint8, pin_memory=True)
        return buffer


def _torch_type(array: NDArray[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype
