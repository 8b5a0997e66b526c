"""Each Triton kernel against `ReferenceOps` in fp32, on any device: small shapes in the interpreter, large ones on a GPU.

Inputs are new in every run; a failure names its seed. Outputs start as NaN inside a larger buffer of NaN, and so do all places of a KV
pool outside the contexts: whatever is read from there or not written shows in the answer, and whatever is written around it is found.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.kernels.ops import Paging
from diptych.kernels.reference import ReferenceOps

REFERENCE = ReferenceOps()
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GUARD = 256       # elements of poison on either side


@dataclass(frozen=True)
class Device:
    """Where a check runs, and its source of randomness."""

    name: str
    seed: int

    @classmethod
    def fresh(cls, name: str) -> "Device":
        return cls(name, torch.seed() % 2**32)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖; NaN if either holds one."""
    difference = torch.linalg.vector_norm(found.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()).clamp_min(1e-30))


def assert_close(found: Tensor, expected: Tensor, tolerance: float, device: Device) -> None:
    error = relative_error(found, expected)
    assert error <= tolerance, f"relative error {error:.2e} over {tolerance:.0e}, seed {device.seed}"      # NaN fails too


class Guarded:
    """A tensor of NaN with poison before and behind it."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: Device) -> None:
        size = torch.Size(shape).numel()
        self._buffer = torch.full((size + 2 * GUARD,), torch.nan, device=device.name).to(dtype)
        self._untouched = self._buffer.view(torch.uint8).clone()
        self._edges = GUARD * dtype.itemsize, (GUARD + size) * dtype.itemsize
        self.tensor = self._buffer[GUARD : GUARD + size].view(tuple(shape))

    def assert_untouched_around(self) -> None:
        first, last = self._edges
        now = self._buffer.view(torch.uint8)
        assert torch.equal(now[:first], self._untouched[:first]), "written before the output"
        assert torch.equal(now[last:], self._untouched[last:]), "written behind the output"


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8).clone()


@dataclass(frozen=True)
class AttentionCase:
    """Sequences as (query rows, tokens cached before them)."""

    lengths: tuple[tuple[int, int], ...]
    heads: tuple[int, int] = (8, 2)
    head_dim: int = 64
    block_size: int = 16
    window: int | None = None
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None       # the pool's, where it is not the queries'

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass(frozen=True)
class AttentionInputs:
    q: Tensor                       # [T, heads, head_dim], rows as they lie in a fused qkv
    kv_pool: Tensor                 # poison outside the contexts
    wide_pool: Tensor               # the same values in fp32, scales multiplied in
    kv_scales: Tensor | None
    layer: int
    paging: Paging


def attention_inputs(case: AttentionCase, device: Device) -> AttentionInputs:
    """All sequences' blocks shuffled in one pool of three layers, with block 0 (the tables' padding) and others in nobody's hands."""
    generator, layer = device.generator(), 1
    num_heads, kv_heads = case.heads
    contexts = [queries + earlier for queries, earlier in case.lengths]
    counts = [-(-context // case.block_size) for context in contexts]
    ids = (torch.randperm(sum(counts) + 2, generator=generator) + 1).tolist()
    pool = torch.full((len(ids) + 1, 3, 2, kv_heads, case.block_size, case.head_dim), torch.nan)
    tables = torch.zeros(len(counts), max(counts, default=0) + 1, dtype=torch.int32)
    for i, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        tables[i, :count] = torch.tensor([ids.pop() for _ in range(count)])
        positions = torch.arange(context)
        slots = tables[i, positions // case.block_size].long() * case.block_size + positions % case.block_size
        k, v = torch.randn(2, context, kv_heads, case.head_dim, generator=generator) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
        REFERENCE.write_kv(pool, layer, k, v, slots)
    qkv = torch.randn(sum(queries for queries, _ in case.lengths), num_heads + 2 * kv_heads, case.head_dim, generator=generator)
    starts = torch.tensor([0] + [queries for queries, _ in case.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    paging = Paging(starts.to(device.name), torch.tensor(contexts, dtype=torch.int32, device=device.name), tables.to(device.name))
    qkv, pool, scales = qkv.to(device.name, case.dtype), pool.to(device.name), None
    wide = stored = pool.to(case.kv_dtype or case.dtype)
    if case.kv_dtype is not None:
        scales = pool.nan_to_num(0).abs().amax((0, 4, 5)) / 448                   # [layers, 2, kv_heads]
        spread = scales[None, :, :, :, None, None]
        stored = (pool / spread).to(case.kv_dtype)
        wide = stored.float() * spread
    return AttentionInputs(qkv[:, :num_heads], stored, wide.float(), scales, layer, paging)


def expected_attention(case: AttentionCase, inputs: AttentionInputs) -> Tensor:
    return REFERENCE.paged_attention(inputs.q.float(), inputs.wide_pool, inputs.layer, inputs.paging, case.scale, case.window)


def check_attention(case: AttentionCase, device: Device, splits: int = 1) -> None:
    """Both kernels on one batch: each writes its own sequences' rows, no other place, and leaves the pool as it was."""
    from diptych.kernels.decode_attention import decode_attention
    from diptych.kernels.prefill_attention import prefill_attention

    inputs = attention_inputs(case, device)
    pool_before, q_before = bits(inputs.kv_pool), bits(inputs.q)
    out = Guarded(inputs.q.shape, case.dtype, device)
    arguments = (out.tensor, inputs.q, inputs.kv_pool, inputs.layer, inputs.paging, case.scale, case.window, inputs.kv_scales)
    decode_attention(*arguments, splits)
    rows = inputs.paging.query_starts.diff().repeat_interleave(inputs.paging.query_starts.diff().long())
    assert bool(out.tensor[rows > 1].isnan().all()), "the decode kernel wrote a chunk's row"
    prefill_attention(*arguments)
    assert_close(out.tensor, expected_attention(case, inputs), TOLERANCE[case.dtype], device)
    out.assert_untouched_around()
    assert torch.equal(bits(inputs.kv_pool), pool_before)
    assert torch.equal(bits(inputs.q), q_before)
