"""The reference ops against their formulas written out element by element, over pools full of NaN where nothing was written."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diptych.kernels.ops import Paging
from diptych.kernels.reference import ReferenceOps

torch.set_num_threads(1)

OPS = ReferenceOps()
LAYERS, LAYER = 2, 1


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@dataclass(frozen=True)
class Sequence:
    """Contiguous keys and values of one sequence, and the query rows at its end."""

    q: Tensor         # [queries, heads, head_dim]
    k: Tensor         # [context, kv_heads, head_dim]
    v: Tensor


def naive_attention(sequence: Sequence, scale: float, window: int | None) -> Tensor:
    """One query row, one head at a time: softmax(q · k * scale) v over the keys that are visible."""
    num_queries, num_heads, _ = sequence.q.shape
    context, kv_heads, _ = sequence.k.shape
    out = torch.empty_like(sequence.q)
    for row in range(num_queries):
        last = context - num_queries + row
        first = 0 if window is None else max(0, last - window + 1)
        for head in range(num_heads):
            kv_head = head // (num_heads // kv_heads)
            keys, values = sequence.k[first : last + 1, kv_head], sequence.v[first : last + 1, kv_head]
            out[row, head] = torch.softmax(keys @ sequence.q[row, head] * scale, 0) @ values
    return out


def paged(sequences: list[Sequence], block_size: int, seed: int) -> tuple[Tensor, Paging]:
    """All sequences in one pool of shuffled blocks, written through `write_kv`."""
    counts = [-(-len(s.k) // block_size) for s in sequences]
    ids = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(seed)).tolist()
    kv_heads, head_dim = sequences[0].k.shape[1:]
    pool = torch.full((len(ids), LAYERS, 2, kv_heads, block_size, head_dim), torch.nan)
    tables = torch.zeros(len(sequences), max(counts) + 1, dtype=torch.int32)
    for i, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
        tables[i, :count] = torch.tensor([ids.pop() for _ in range(count)])
        positions = torch.arange(len(sequence.k))
        slots = tables[i, positions // block_size].long() * block_size + positions % block_size
        OPS.write_kv(pool, LAYER, sequence.k, sequence.v, slots)
    lengths = torch.tensor([0] + [len(s.q) for s in sequences], dtype=torch.int32)
    contexts = torch.tensor([len(s.k) for s in sequences], dtype=torch.int32)
    return pool, Paging(lengths.cumsum(0, dtype=torch.int32), contexts, tables)


def random_sequence(num_queries: int, context: int, heads: tuple[int, int], head_dim: int, generator: torch.Generator) -> Sequence:
    q = torch.randn(num_queries, heads[0], head_dim, generator=generator)
    k, v = torch.randn(2, context, heads[1], head_dim, generator=generator)
    return Sequence(q, k, v)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=5),
    heads=st.sampled_from([(3, 1), (6, 3), (4, 4), (8, 2), (1, 1)]),
    head_dim=st.sampled_from([2, 6, 16]),
    block_size=st.integers(1, 64),
    window=st.one_of(st.none(), st.integers(1, 12)),
    seed=st.integers(0, 1000),
)
def test_paged_attention_is_the_formula(
    lengths: list[tuple[int, int]], heads: tuple[int, int], head_dim: int, block_size: int, window: int | None, seed: int
) -> None:
    """Any mix of decodes, chunks with and without earlier context, in any block size."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [random_sequence(queries, earlier + queries, heads, head_dim, generator) for queries, earlier in lengths]
    pool, paging = paged(sequences, block_size, seed)
    scale = head_dim**-0.5
    found = OPS.paged_attention(torch.cat([s.q for s in sequences]), pool, LAYER, paging, scale, window)
    close(found, torch.cat([naive_attention(s, scale, window) for s in sequences]))


def test_a_decode_beside_a_longer_one_reads_nothing_past_its_own_context() -> None:
    generator = torch.Generator().manual_seed(0)
    sequences = [random_sequence(1, context, (6, 3), 8, generator) for context in (1, 33, 4)]
    pool, paging = paged(sequences, 16, seed=0)
    found = OPS.paged_attention(torch.cat([s.q for s in sequences]), pool, LAYER, paging, 0.3, None)
    close(found, torch.cat([naive_attention(s, 0.3, None) for s in sequences]))


@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_write_kv_fills_its_slots_and_nothing_else(block_size: int) -> None:
    num_tokens, num_blocks = 10, 12
    pool = torch.full((num_blocks, LAYERS, 2, 3, block_size, 4), torch.nan)
    k, v = torch.randn(2, num_tokens, 3, 4)
    slots = torch.randperm(num_blocks * block_size)[:num_tokens]
    OPS.write_kv(pool, LAYER, k, v, slots)
    for token, slot in enumerate(slots.tolist()):
        page = pool[slot // block_size, LAYER, :, :, slot % block_size]
        assert torch.equal(page, torch.stack((k[token], v[token])))
    assert int((~pool.isnan()).sum()) == 2 * k.numel()


@pytest.mark.parametrize(
    ("dtype", "scales", "tolerance"),
    [
        (torch.bfloat16, None, 0.02),
        (torch.float8_e4m3fn, None, 0.15),
        (torch.float8_e4m3fn, torch.rand(LAYERS, 2, 3, generator=torch.Generator().manual_seed(2)) + 0.1, 0.15),
    ],
)
def test_a_pool_of_another_type_is_read_as_what_was_written(dtype: torch.dtype, scales: Tensor | None, tolerance: float) -> None:
    """Numbers a hundred times larger than fp8 holds, where scales bring them back into its range."""
    ops, factor, draw = ReferenceOps(scales), 1.0 if scales is None else 100.0, torch.Generator().manual_seed(3)
    k, v = torch.randn(2, 12, 3, 8, generator=draw) * factor * (1.0 if scales is None else scales[LAYER, :, None, :, None])
    pool, tables = torch.zeros(4, LAYERS, 2, 3, 4, 8).to(dtype), torch.tensor([[2, 0, 3]], dtype=torch.int32)
    ops.write_kv(pool, LAYER, k, v, tables[0].long().repeat_interleave(4) * 4 + torch.arange(12) % 4)
    q = torch.randn(1, 6, 8, generator=draw) / factor
    paging = Paging(torch.tensor([0, 1], dtype=torch.int32), torch.tensor([12], dtype=torch.int32), tables)
    found = ops.paged_attention(q, pool, LAYER, paging, 0.3, None)
    expected = naive_attention(Sequence(q, k, v), 0.3, None)
    assert found.dtype is torch.float32
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("shape", [(5, 12), (4, 3, 6)])
def test_rms_norm_is_the_formula(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape) * 7, torch.randn(shape[-1])
    expected = [[value / math.sqrt(sum(v * v for v in row) / len(row) + 1e-5) for value in row] for row in x.flatten(0, -2).tolist()]
    close(OPS.rms_norm(x, weight, 1e-5), torch.tensor(expected).view(shape) * weight)


def test_add_rms_norm_gives_the_norm_and_the_sum() -> None:
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    total = x + residual
    normed, new_residual = OPS.add_rms_norm(x.clone(), residual.clone(), weight, 1e-6)
    close(new_residual, total)
    close(normed, OPS.rms_norm(total, weight, 1e-6))


def test_rope_turns_each_pair_by_its_angle() -> None:
    positions, head_dim = torch.tensor([3, 0, 17]), 6
    angles = torch.randn(20, head_dim // 2)
    q, k = torch.randn(3, 2, head_dim), torch.randn(3, 1, head_dim)
    rotated = OPS.rope(q.clone(), k.clone(), positions, torch.cat((angles.cos(), angles.sin()), -1))
    for before, after in zip((q, k), rotated, strict=True):
        turned = torch.polar(torch.ones_like(angles), angles)[positions, None]      # complex numbers turn by multiplication
        expected = torch.complex(*before.chunk(2, -1)) * turned
        close(after, torch.cat((expected.real, expected.imag), -1))


def test_silu_mul_is_the_formula() -> None:
    gate, up = torch.randn(2, 4, 10)
    close(OPS.silu_mul(torch.cat((gate, up), -1)), gate / (1 + torch.exp(-gate)) * up)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_and_near(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    sequences = [random_sequence(queries, 20, (4, 2), 8, generator) for queries in (1, 5, 1)]
    pool, paging = paged(sequences, 8, seed=1)
    q = torch.cat([s.q for s in sequences])
    found = OPS.paged_attention(q.to(dtype), pool.to(dtype), LAYER, paging, 0.4, 9)
    assert found.dtype is dtype
    close(found.float(), OPS.paged_attention(q, pool, LAYER, paging, 0.4, 9), tolerance=0.05)
    x, weight = torch.randn(3, 8), torch.randn(8)
    assert OPS.rms_norm(x.to(dtype), weight.to(dtype), 1e-6).dtype is dtype
    table = torch.randn(20, 8)
    assert {x.dtype for x in OPS.rope(q.to(dtype), q.to(dtype), torch.arange(len(q)), table)} == {dtype}
