"""Page ids: what is wrong with them, which of them are neighbours, and their way to the GPU.

They travel in pinned buffers, which the kernel itself reads and stores in a twin on the device, and in which it says when it has ended;
then both are used again.
"""

from typing import NamedTuple

import numpy as np
import torch

from ...messages.errors import TransferError
from ..transport import FEW_PAGES, IdArray, PageIds, as_array

SMALLEST = 1024                # pages
NUM_READY = 32                 # slots of that size made in advance: pinning takes long
NUM_TIMES = 4                  # when the kernel began and ended; the same of a first one, in front of copies by copy engines
FIRST_TIMES = 16               # bytes from the one pair to the other


class Slot:
    def __init__(self, capacity: int, device: torch.device) -> None:
        """capacity: pages."""
        self.capacity = capacity
        self._pinned = torch.zeros(2 * capacity + NUM_TIMES, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._on_device = torch.empty(2 * capacity, dtype=torch.int64, device=device)
        self._values: IdArray = self._pinned.numpy()
        self.ids = self._values[: 2 * capacity]            # of the last write: all here, then all there
        self._times = self._values[2 * capacity :]
        self._cells = self._values.data                    # for one by one
        self.ids_address, self.scratch_address = self._pinned.data_ptr(), self._on_device.data_ptr()
        self.times_address = self.ids_address + 2 * capacity * self._values.itemsize

    @property
    def buffers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, pinned, and their twin on the device: [2 × capacity] int64 each; times, pinned: [2] int64."""
        return self._pinned[: 2 * self.capacity], self._on_device, self._pinned[2 * self.capacity :][:2]

    @property
    def has_ended(self) -> bool:
        """The GPU will not touch this slot, nor pages for it, any more."""
        return bool(self._times[1])

    @property
    def times_ns(self) -> tuple[int, int]:
        """By the GPU's clock: when it began, when it ended; 0: not yet."""
        began, ended, copies_began, _ = self._times.tolist()
        return copies_began or began, ended

    def fill(self, here: list[int] | IdArray, there: list[int] | IdArray) -> None:
        """Ids here, then ids there."""
        for start, pages in ((0, here), (len(here), there)):
            if isinstance(pages, list):
                for at, page in enumerate(pages, start):
                    self._cells[at] = page
            else:
                self.ids[start : start + len(pages)] = pages
        for at in range(2 * self.capacity, len(self._cells)):
            self._cells[at] = 0


def as_told(pages: PageIds, num_pages: int, where: str) -> list[int] | IdArray:
    """A short list as it is, else an array. Raises TransferError if there are no such pages."""
    if not isinstance(pages, list) or len(pages) > FEW_PAGES:
        pages = as_array(pages)
        is_wrong = len(pages) and np.maximum.reduce(pages.view(np.uint64)) >= num_pages         # what is negative is huge so
    else:
        is_wrong = len(pages) and (min(pages) < 0 or max(pages) >= num_pages)
    if is_wrong:
        raise TransferError(f"pages {min(pages)} to {max(pages)}: there are {num_pages} {where}")
    return pages


class Runs(NamedTuple):
    """Of pages that are neighbours on both sides."""

    lengths: IdArray
    here: IdArray                  # the first page of each
    there: IdArray


def are_scattered(here: IdArray, there: IdArray, most_runs: int) -> bool:
    """Whether a look at a few of them shows that they are more than `most_runs` runs, without a look at all."""
    stride = max(1, len(here) // (4 * most_runs))
    are_neighbours = (here[1::stride] - here[:-1:stride] == 1) & (there[1::stride] - there[:-1:stride] == 1)
    return int(np.count_nonzero(are_neighbours)) + most_runs <= len(are_neighbours)


def runs_of(here: IdArray, there: IdArray) -> Runs:
    breaks = np.flatnonzero((np.diff(here) != 1) | (np.diff(there) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    return Runs(np.diff(np.append(starts, len(here))), here[starts], there[starts])


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
