"""Page ids: what is wrong with them, which of them are neighbours, and their way to the GPU.

They travel in pinned buffers, each with a twin on the device, which are used again once the write that read them has ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ...messages.errors import TransferError

SMALLEST = 512                 # pages
NUM_READY = 32                 # slots of that size made in advance: pinning takes long

PageIds = npt.NDArray[np.int64]


@dataclass(eq=False)
class Slot:
    capacity: int              # pages
    pinned: torch.Tensor       # [2 × capacity] int64
    on_device: torch.Tensor

    def __post_init__(self) -> None:
        self._view: PageIds = self.pinned.numpy()

    def fill(self, src_pages: Sequence[int], dst_pages: Sequence[int]) -> tuple[PageIds, PageIds]:
        """Ids here, then ids there; views of both."""
        count = len(src_pages)
        here, there = self._view[:count], self._view[count : 2 * count]
        here[:], there[:] = as_array(src_pages), as_array(dst_pages)
        return here, there


def as_array(pages: Sequence[int]) -> PageIds:
    """Without a Python object per page where the sequence allows it: ranges, numpy arrays, array('q')."""
    if isinstance(pages, range):
        return np.arange(pages.start, pages.stop, pages.step, dtype=np.int64)
    return np.asarray(pages, dtype=np.int64)


def check_pages(pages: PageIds, num_pages: int, where: str) -> None:
    """Raises TransferError."""
    if len(pages) and not 0 <= pages.min() <= pages.max() < num_pages:
        raise TransferError(f"pages {pages.min()} to {pages.max()}: there are {num_pages} {where}")


def runs_of(here: PageIds, there: PageIds) -> tuple[PageIds, PageIds, PageIds]:
    """(length, first page here, first page there) of each run of pages that are neighbours on both sides."""
    breaks = np.flatnonzero((np.diff(here) != 1) | (np.diff(there) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    return np.diff(np.append(starts, len(here))), here[starts], there[starts]


class Slots:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: dict[int, list[Slot]] = {SMALLEST: [self._make(SMALLEST) for _ in range(NUM_READY)]}

    def _make(self, capacity: int) -> Slot:
        pinned = torch.empty(2 * capacity, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        return Slot(capacity, pinned, torch.empty(2 * capacity, dtype=torch.int64, device=self._device))

    def take(self, num_pages: int) -> Slot:
        capacity = max(SMALLEST, 1 << (num_pages - 1).bit_length())
        free = self._free.setdefault(capacity, [])
        return free.pop() if free else self._make(capacity)

    def give_back(self, slot: Slot) -> None:
        self._free[slot.capacity].append(slot)
