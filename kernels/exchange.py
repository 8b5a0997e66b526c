"""What ranks of one model add up, each on a GPU of its own, all in one process: sums of their products, and the rows of their logits.

    rank 0:  x · W ─► part ─┐                      one kernel a rank: tells all that its part is there, waits for theirs,
    rank 1:  x · W ─► part ─┼─► Σ parts + bias     reads them over NVLink, adds in the order of the ranks: all get the same bits
    …                       │     + residual
                            └─► RMSNorm ─► normed, residual         of all rows, in each rank (*gathered*)
                                                                    or of a rank's own rows, which it stores in all ranks (*scattered*)

Scattered, a rank reads and writes (R − 1) / R of the rows once each, instead of reading R − 1 times all of them, but the next product has
to wait once more, until the others' rows have come. The residual stays with the rank that the rows belong to.

What makes it safe: a part lies in one of two buffers in turn. Who tells that its part of call k + 1 is there has read all of call k, so
call k + 2 may overwrite it. Rows of `normed` are stored only once all have told that they are at the next call, after their products have
read the last ones. Calls are counted on the device, so a captured CUDA graph goes on counting, and a forward pass makes an even number.

A kernel spins until its peers' have begun: whoever waits for one rank's device must have launched the same on all of them. If a rank fails
before it has, `release` lets the others end.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, permutations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap import after_predecessor, overlapping

UNIT_BYTES = 16                   # distances between ranks' memories are counted in
COLUMNS_OF_A_WARP = 256
LOGIT_TILE = 4096
MOST_GATHERED_ROWS = 256          # above, two H200 were 1 to 8 % faster scattered; below, up to 40 % slower
PART, NORMED, LOGITS = range(3)   # what is told
SPACE_BYTES = 1024                # of flags and counts
LONG_AGO = 1 << 62                # no call will ever be waited for


@dataclass(frozen=True)
class ExchangeShape:
    """How much passes between ranks at once."""

    num_ranks: int
    max_rows: int
    width: int                     # of a row: the model's hidden size
    logit_rows: int
    logit_columns: int             # of one rank: its rows of the head; 0: each has the whole head
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of: flags and counts, parts in turn, normed rows, logits."""
        rows = _aligned(self.max_rows * self.row_bytes)
        return SPACE_BYTES, rows, rows, rows, _aligned(self.logit_rows * self.logit_columns * self.dtype.itemsize)


class Exchange:
    """One rank's end. `memories`: of each rank, uint8, `sum(shape.sizes)` bytes of zeros, which the others' kernels can reach."""

    def __init__(self, rank: int, memories: Sequence[Tensor], shape: ExchangeShape) -> None:
        own = memories[rank]
        self.rank, self.shape = rank, shape
        starts = [0, *accumulate(shape.sizes)]
        space, *parts, normed, logits = (own[a:b] for a, b in pairwise(starts))
        num_flags, words = 3 * shape.num_ranks, space.view(torch.int64)
        assert num_flags + 4 <= len(words), f"{shape.num_ranks} ranks do not fit into {SPACE_BYTES} bytes"
        self._flags, self._counts, self._finished = words[:num_flags], words[num_flags:][:2], words[num_flags + 2 :][:2]
        self._long_ago = torch.full((num_flags,), LONG_AGO, pin_memory=own.is_cuda)
        self._aside = torch.cuda.Stream(own.device) if own.is_cuda else None
        self._parts = [part.view(shape.dtype) for part in parts]
        self._normed, self._logits = normed.view(shape.dtype), logits.view(shape.dtype)
        units = [(memory.data_ptr() - own.data_ptr()) // UNIT_BYTES for memory in memories]
        self._distances = torch.tensor(units, dtype=torch.int64, device=own.device)
        self._turn = 0

    @classmethod
    def among(cls, devices: Sequence[torch.device], shape: ExchangeShape) -> "list[Exchange]":
        """Raises ValueError: two of the GPUs do not reach each other."""
        require_reach(devices)
        memories = [torch.zeros(sum(shape.sizes), dtype=torch.uint8, device=device) for device in devices]
        ends = [cls(rank, memories, shape) for rank in range(len(devices))]
        for device in devices:
            torch.cuda.synchronize(device)
        return ends

    def begin(self) -> None:
        """A forward pass."""
        self._turn = 0

    def release(self) -> None:
        """Ends all waiting on this rank's device, now and from now on: what it adds up means nothing any more. From any thread."""
        with torch.cuda.stream(self._aside):
            self._flags.copy_(self._long_ago, non_blocking=True)

    def part(self, num_rows: int) -> Tensor:
        """[num_rows, width]: where this rank's product of the next call is to be put."""
        assert num_rows <= self.shape.max_rows, f"{num_rows} rows of {self.shape.max_rows}"
        return self._parts[self._turn][: num_rows * self.shape.width].view(num_rows, self.shape.width)

    def add_rms_norm(
        self, bias: Tensor | None, residual: Tensor, weight: Tensor, eps: float, scatters: bool | None = None
    ) -> Tensor:
        """residual [T, width] += Σ parts + bias, → its norm [T, width]: of all rows. Where they were scattered the residual is right in the
        rank's own rows only, and what is returned is overwritten by the next such call. `scatters` is for measuring and tests."""
        num_rows, ranks, n = len(residual), self.shape.num_ranks, self.shape.width
        part, self._turn = self.part(num_rows), 1 - self._turn
        if scatters is None:
            scatters = num_rows > MOST_GATHERED_ROWS
        out = self._normed[: num_rows * n].view(num_rows, n) if scatters else torch.empty_like(part)
        own_rows = triton.cdiv(num_rows, ranks) if scatters else num_rows
        width = triton.next_power_of_2(n)
        _sum_norm_kernel[(own_rows,)](
            out, part, bias, residual, weight, self._flags, self._counts, self._finished, self._distances, self.rank, num_rows, eps,
            RANKS=ranks, SCATTERS=scatters, N=n, WIDTH=width, num_warps=min(16, max(4, width // COLUMNS_OF_A_WARP)), **overlapping(),
        )  # fmt: skip
        if scatters:
            _wait_kernel[(1,)](self._flags, self._counts, KIND=NORMED, RANKS=ranks, num_warps=1, **overlapping())
        return out

    def logits_part(self, num_rows: int) -> Tensor:
        """[num_rows, logit_columns]: where this rank's logits are to be put."""
        assert num_rows <= self.shape.logit_rows, f"{num_rows} rows of logits, of {self.shape.logit_rows}"
        return self._logits[: num_rows * self.shape.logit_columns].view(num_rows, self.shape.logit_columns)

    def gather_logits(self, part: Tensor) -> Tensor:
        """part: `logits_part`, filled in → in rank 0 [R, num_ranks × logit_columns]; in the others `part`."""
        (num_rows, columns), ranks = part.shape, self.shape.num_ranks
        counts = self._counts[1:]
        if self.rank:
            _tell_kernel[(1,)](self._flags, counts, self._distances, self.rank, KIND=LOGITS, RANKS=ranks, num_warps=1, **overlapping())
            return part
        out = torch.empty(num_rows, ranks * columns, dtype=part.dtype, device=part.device)
        _gather_kernel[(triton.cdiv(columns, LOGIT_TILE), ranks, num_rows)](
            out, part, self._flags, counts, self._finished[1:], self._distances, columns,
            KIND=LOGITS, RANKS=ranks, TILE=LOGIT_TILE, num_warps=8, **overlapping(),
        )  # fmt: skip
        return out


def require_reach(devices: Sequence[torch.device]) -> None:
    """Lets each GPU read and write the others' memory. Raises ValueError."""
    for here, there in permutations(devices, 2):
        if not torch.cuda.can_device_access_peer(here, there):
            raise ValueError(f"{here} does not reach the memory of {there}")
        torch.zeros(1, device=here).to(there)              # torch asks the driver for access when it first copies


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // UNIT_BYTES) * UNIT_BYTES


@triton.jit(do_not_specialize=["rank", "num_rows"])
def _sum_norm_kernel(
    out, part, bias, residual, weight, flags, counts, finished, distances, rank, num_rows, eps,
    RANKS: tl.constexpr, SCATTERS: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program for each row that this rank adds up."""
    after_predecessor(PDL)
    call = tl.load(counts, volatile=True) + 1
    if tl.program_id(0) == 0:
        _tell(flags, distances, rank, call, 0, RANKS, RANKS)
    _wait(flags, call, 0, RANKS)
    row = tl.program_id(0).to(tl.int64)
    if SCATTERS:
        row += rank * tl.num_programs(0)
    columns = tl.arange(0, WIDTH)
    there = (columns < N) & (row < num_rows)
    total = tl.zeros([WIDTH], tl.float32)
    for peer in tl.static_range(RANKS):
        total += tl.load(_at(part, distances, peer) + row * N + columns, mask=there, other=0.0, cache_modifier=".cg").to(tl.float32)
    if bias is not None:
        total += tl.load(bias + columns, mask=there, other=0.0).to(tl.float32)
    total = total.to(out.dtype.element_ty).to(tl.float32)
    total += tl.load(residual + row * N + columns, mask=there, other=0.0).to(tl.float32)
    kept = total.to(out.dtype.element_ty)
    tl.store(residual + row * N + columns, kept, mask=there)
    wide = kept.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / N + eps)
    factors = tl.load(weight + columns, mask=there, other=0.0).to(tl.float32)
    normed = ((wide * scale).to(out.dtype.element_ty).to(tl.float32) * factors).to(out.dtype.element_ty)
    if SCATTERS:
        for peer in tl.static_range(RANKS):
            tl.store(_at(out, distances, peer) + row * N + columns, normed, mask=there)
    else:
        tl.store(out + row * N + columns, normed, mask=there)
    if _is_last(finished):
        tl.store(counts, call)
        if SCATTERS:
            _tell(flags, distances, rank, call, 1, RANKS, RANKS)


@triton.jit
def _wait_kernel(flags, counts, KIND: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr):
    after_predecessor(PDL)
    _wait(flags, tl.load(counts, volatile=True), KIND, RANKS)


@triton.jit(do_not_specialize=["rank"])
def _tell_kernel(flags, counts, distances, rank, KIND: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr):
    after_predecessor(PDL)
    call = tl.load(counts, volatile=True) + 1
    _tell(flags, distances, rank, call, KIND, RANKS, 1)     # rank 0 alone has to know
    tl.store(counts, call)


@triton.jit
def _gather_kernel(
    out, part, flags, counts, finished, distances, columns,
    KIND: tl.constexpr, RANKS: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program for each tile of each rank's columns of a row."""
    after_predecessor(PDL)
    call = tl.load(counts, volatile=True) + 1
    peer, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if peer != 0:
        while tl.atomic_add(flags + KIND * RANKS + peer, 0, sem="acquire", scope="sys") < call:
            pass
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    logits = tl.load(_at(part, distances, peer) + row * columns + at, mask=at < columns, other=0.0, cache_modifier=".cg")
    tl.store(out + (row * RANKS + peer) * columns + at, logits, mask=at < columns)
    if _is_last(finished):
        tl.store(counts, call)


@triton.jit
def _at(place, distances, peer):
    """The same place in a peer's memory: vectors stay aligned, which an address as a number would not tell the compiler."""
    return place + tl.load(distances + peer) * (128 // place.dtype.element_ty.primitive_bitwidth)


@triton.jit
def _tell(flags, distances, rank, call, kind: tl.constexpr, RANKS: tl.constexpr, ALL: tl.constexpr):
    for peer in tl.static_range(ALL):
        tl.atomic_xchg(_at(flags, distances, peer) + kind * RANKS + rank, call, sem="release", scope="sys")


@triton.jit
def _wait(flags, call, kind: tl.constexpr, RANKS: tl.constexpr):
    for peer in tl.static_range(RANKS):
        while tl.atomic_add(flags + kind * RANKS + peer, 0, sem="acquire", scope="sys") < call:
            pass


@triton.jit
def _is_last(finished):
    """Of all programs to get here, whose stores it then stands for."""
    tl.debug_barrier()
    num_programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    last = tl.atomic_add(finished, 1, sem="acq_rel", scope="sys") == num_programs - 1
    if last:
        tl.store(finished, 0)
    return last
