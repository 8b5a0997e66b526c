"""Makes pages of one layout from pages of another. How many tokens a block holds may differ, and how a number is stored; whatever
else says what a number in a page means must be equal.

Heads come before tokens in a page, so a run of tokens (`regrouping.py`) is one piece of memory for each of K and V and each head: a row.
On a GPU one kernel does it all (`kernels/page_conversion.py`), and what it stores is what is stored here.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..kernels.kv_storage import loaded, stored
from ..messages.errors import LayoutMismatch
from .layout import KVLayout
from .regrouping import Regrouping
from .transport import IdArray, KVPool

AT_ONCE_BYTES = 16 << 20
"""Of source pages, on a CPU: between two types their numbers pass through fp32 and take up to seven times as much besides."""


def require_convertible(source: KVLayout, target: KVLayout) -> None:
    """Raises LayoutMismatch with what stands in the way, by name."""
    difference = source.told.differences(replace(target, block_size=source.block_size, dtype=source.dtype).told)
    if source.tp_size != target.tp_size:
        difference = "; ".join(filter(None, (difference, f"tp_size {source.tp_size}, there {target.tp_size}")))
    if difference:
        raise LayoutMismatch(f"KV cannot be converted: {difference}")


class Converter:
    """From one rank's pool into another of the same process and device. `scales` [num_layers, 2, rank_heads] fp32 are the model's, for
    fp8: of the rank's heads."""

    def __init__(self, source: KVPool, target: KVPool, scales: Tensor | None) -> None:
        require_convertible(source.layout, target.layout)
        self.regrouping = Regrouping(source.layout.block_size, target.layout.block_size)
        self._layout = source.layout
        self._dtypes = source.layout.dtype, target.layout.dtype
        self._pools = source.tensor, target.tensor
        self._scales = None if scales is None else scales.to(source.tensor.device)
        row = self.regrouping.run_tokens * source.layout.head_dim
        self._source, self._target = _as_words(source.tensor, row), _as_words(target.tensor, row)
        if source.tensor.is_cuda:
            # Compiled before a prompt waits for it: of no blocks nothing is made.
            self._make_on_gpu(np.array([0]), np.array([0]), np.array([], dtype=np.int64))

    def make(self, pages: IdArray, targets: IdArray, src_blocks: IdArray) -> None:
        """Page i of a prompt (its block in the receiver's terms × num_layers + layer) into page `targets[i]` of the target pool.
        `src_blocks`: the blocks that hold the prompt here. On a GPU, on its current stream."""
        make = self._make_on_gpu if self._source.is_cuda else self._make_here
        make(pages, targets, src_blocks)

    def _make_on_gpu(self, pages: IdArray, targets: IdArray, src_blocks: IdArray) -> None:
        from ..kernels.page_conversion import convert_pages  # needs Triton

        source, target = self._pools
        ids = torch.from_numpy(np.concatenate((pages, targets, src_blocks)))
        # From memory that is not pinned the copy would wait here for all that the engine has queued.
        there = ids.pin_memory().to(source.device, non_blocking=True)
        prompt = 2 * len(pages)
        with torch.cuda.device(source.device):
            convert_pages(source, target, there[: len(pages)], there[len(pages) : prompt], there[prompt:], self._scales)

    def _make_here(self, pages: IdArray, targets: IdArray, src_blocks: IdArray) -> None:
        num_layers, grouping = self._layout.num_layers, self.regrouping
        runs = grouping.runs_into(pages // num_layers, len(src_blocks))
        layers = (pages % num_layers)[runs.asked]
        src_pages = src_blocks[runs.src_blocks] * num_layers + layers
        run_bytes = 2 * self._layout.rank_heads * self._source.shape[1] * self._source.itemsize
        at_once = max(1, AT_ONCE_BYTES // run_bytes)
        for start in range(0, len(layers), at_once):
            piece = slice(start, start + at_once)
            rows = self._source.index_select(0, self._rows(src_pages[piece], runs.src_places[piece], grouping.src_size))
            there = self._rows(targets[runs.asked[piece]], runs.places[piece], grouping.dst_size)
            self._target.index_copy_(0, there, self._as_stored_there(rows, layers[piece]))

    def _rows(self, pages: IdArray, places: IdArray, block_size: int) -> Tensor:
        """Of runs at `places` in `pages`, for K and V of every head → [runs × 2 × rank_heads]."""
        heads = np.arange(2 * self._layout.rank_heads)
        per_page = block_size // self.regrouping.run_tokens
        rows = (pages[:, None] * len(heads) + heads) * per_page + places[:, None]
        return torch.from_numpy(rows.ravel())

    def _as_stored_there(self, rows: Tensor, layers: IdArray) -> Tensor:
        here, there = self._dtypes
        if here is there:
            return rows
        scales = None if self._scales is None else self._scales[torch.from_numpy(layers)].reshape(-1, 1)
        return stored(loaded(rows.view(here), torch.float32, scales), there, scales).view(self._target.dtype)


def _as_words(pool: Tensor, row: int) -> Tensor:
    """Its numbers `row` by `row`, in the widest type that fits: moving them is not everywhere possible for fp8, and slower."""
    rows = pool.view(-1, row)
    return rows.view(torch.int64 if row * pool.itemsize % 8 == 0 else torch.uint8)
