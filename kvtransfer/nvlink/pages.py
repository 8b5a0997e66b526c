"""Page ids: what is wrong with them, which of them are neighbours, and their way to the GPU.

They travel in pinned buffers, which the kernel itself reads and stores in a twin on the device; both are used again once the write that
read them has ended.
"""


import numpy as np
import torch

from ...messages.errors import TransferError
from ..transport import IdArray, PageIds

SMALLEST = 512                 # pages
NUM_READY = 32                 # slots of that size made in advance: pinning takes long


class Slot:
    def __init__(self, capacity: int, device: torch.device) -> None:
        """capacity: pages."""
        self.capacity = capacity
        self._pinned = torch.empty(2 * capacity, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._on_device = torch.empty(2 * capacity, dtype=torch.int64, device=device)
        self.ids: IdArray = self._pinned.numpy()           # of the last write: all here, then all there
        self.ids_address, self.scratch_address = self._pinned.data_ptr(), self._on_device.data_ptr()

    @property
    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pinned and on the device: [2 × capacity] int64 each."""
        return self._pinned, self._on_device

    def fill(self, src_pages: PageIds, dst_pages: PageIds) -> tuple[IdArray, IdArray]:
        """Ids here, then ids there; views of both."""
        count = len(src_pages)
        here, there = self.ids[:count], self.ids[count : 2 * count]
        here[:], there[:] = as_array(src_pages), as_array(dst_pages)
        return here, there


def as_array(pages: PageIds) -> IdArray:
    """Without a Python object per page where the sequence allows it: ranges, numpy arrays, array('q')."""
    if isinstance(pages, range):
        return np.arange(pages.start, pages.stop, pages.step, dtype=np.int64)
    return np.asarray(pages, dtype=np.int64)


def check_pages(pages: IdArray, num_pages: int, where: str) -> None:
    """Raises TransferError."""
    if len(pages) and np.maximum.reduce(pages.view(np.uint64)) >= num_pages:         # what is negative is huge so
        raise TransferError(f"pages {pages.min()} to {pages.max()}: there are {num_pages} {where}")


def runs_of(here: IdArray, there: IdArray) -> tuple[IdArray, IdArray, IdArray]:
    """(length, first page here, first page there) of each run of pages that are neighbours on both sides."""
    breaks = np.flatnonzero((np.diff(here) != 1) | (np.diff(there) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    return np.diff(np.append(starts, len(here))), here[starts], there[starts]


class Slots:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: dict[int, list[Slot]] = {SMALLEST: [Slot(SMALLEST, device) for _ in range(NUM_READY)]}

    def take_free(self, num_pages: int) -> Slot | None:
        free = self._free.get(_capacity(num_pages))
        return free.pop() if free else None

    def take(self, num_pages: int) -> Slot:
        return self.take_free(num_pages) or Slot(_capacity(num_pages), self._device)

    def give_back(self, slot: Slot) -> None:
        self._free.setdefault(slot.capacity, []).append(slot)


def _capacity(num_pages: int) -> int:
    return SMALLEST if num_pages <= SMALLEST else 1 << (num_pages - 1).bit_length()
