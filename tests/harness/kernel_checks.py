"""Each Triton kernel against `ReferenceOps` in fp32, on any device: small shapes in the interpreter, large ones on a GPU.

Inputs are new in every run; a failure names its seed. Outputs start as NaN inside a larger buffer of NaN, and so do all places of a KV
pool outside the contexts: whatever is read from there or not written shows in the answer, and whatever is written around it is found.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diptych.kernels import cudnn_attention, norms, rope_kv, silu_mul, skinny_linear
from diptych.kernels.context_shares import ChunkCut
from diptych.kernels.decode_attention import decode_attention, with_share_list
from diptych.kernels.ops import HeadNorms, Paging
from diptych.kernels.prefill_attention import PrefillTile, prefill_attention
from diptych.kernels.reference import ReferenceOps
from diptych.kernels.triton_ops import TritonOps

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

    def holding(self, values: Tensor) -> Tensor:
        """The tensor, with these values for an operation that works in place."""
        return self.tensor.copy_(values)

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
    sharpness: float = 1.0                    # of the softmax: with 100, scores reach hundreds and most weights underflow

    @property
    def scale(self) -> float:
        return self.sharpness * self.head_dim**-0.5


@dataclass(frozen=True)
class AttentionInputs:
    q: Tensor                       # [T, heads, head_dim], rows as they lie in a fused qkv
    kv_pool: Tensor                 # poison outside the contexts
    wide_pool: Tensor               # the same values in fp32, scales multiplied in
    kv_scales: Tensor | None
    layer: int
    paging: Paging


def attention_inputs(case: AttentionCase, device: Device, blocks_before: int = 0) -> AttentionInputs:
    """All sequences' blocks shuffled in one pool of three layers, with block 0 (the tables' padding) and others in nobody's hands.

    With `blocks_before`, so many more that are nobody's lie before all of them.
    """
    generator, layer = device.generator(), 1
    num_heads, kv_heads = case.heads
    contexts = [queries + earlier for queries, earlier in case.lengths]
    counts = [-(-context // case.block_size) for context in contexts]
    ids = (torch.randperm(sum(counts) + 2, generator=generator) + 1 + blocks_before).tolist()
    pool = torch.full((blocks_before + len(ids) + 1, 3, 2, kv_heads, case.block_size, case.head_dim), torch.nan)
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


def check_cudnn_attention(case: AttentionCase, device: Device) -> None:
    """Of one whole prompt."""
    inputs = attention_inputs(case, device)
    pool_before, q_before = bits(inputs.kv_pool), bits(inputs.q)
    found = cudnn_attention.attention(inputs.q, inputs.kv_pool, inputs.layer, inputs.paging.block_tables[0], case.scale)
    assert_close(found, expected_attention(case, inputs), TOLERANCE[case.dtype], device)
    assert torch.equal(bits(inputs.kv_pool), pool_before)
    assert torch.equal(bits(inputs.q), q_before)


def check_attention(
    case: AttentionCase,
    device: Device,
    splits: int = 1,
    blocks_before: int = 0,
    prefill_tile: PrefillTile | None = None,
    share_tokens: int | None = None,
    cut: ChunkCut | None = None,
    num_sms: int = 132,
) -> None:
    """Both kernels on one batch: each writes its own sequences' rows, no other place, and leaves the pool as it was."""
    inputs = attention_inputs(case, device, blocks_before)
    if share_tokens is not None:
        share = torch.tensor([share_tokens], dtype=torch.int32, device=device.name)
        inputs = replace(inputs, paging=replace(inputs.paging, share_tokens=share))
    pool_before, q_before = bits(inputs.kv_pool), bits(inputs.q)
    decoded, prefilled = Guarded(inputs.q.shape, case.dtype, device), Guarded(inputs.q.shape, case.dtype, device)
    arguments = (inputs.q, inputs.kv_pool, inputs.layer, inputs.paging, case.scale, case.window, inputs.kv_scales)
    listed = with_share_list(inputs.paging, inputs.kv_pool.shape[3], splits, num_sms)
    for _ in range(2):                # layer after layer with one list, which is left as it was
        decoded.tensor.fill_(torch.nan)
        decode_attention(decoded.tensor, *arguments[:3], listed, *arguments[4:], splits, num_sms=num_sms)
    prefill_attention(prefilled.tensor, *arguments, prefill_tile, cut)
    lengths = inputs.paging.query_starts.diff().long()
    is_decode = (lengths == 1).repeat_interleave(lengths)
    assert bool(decoded.tensor[~is_decode].isnan().all()), "the decode kernel wrote a chunk's row"
    assert bool(prefilled.tensor[is_decode].isnan().all()), "the prefill kernel wrote a decode's row"
    found = torch.where(is_decode[:, None, None], decoded.tensor, prefilled.tensor)
    assert_close(found, expected_attention(case, inputs), TOLERANCE[case.dtype], device)
    decoded.assert_untouched_around()
    prefilled.assert_untouched_around()
    assert torch.equal(bits(inputs.kv_pool), pool_before)
    assert torch.equal(bits(inputs.q), q_before)


def check_norms(num_rows: int, n: int, dtype: torch.dtype, device: Device) -> None:
    generator = device.generator()
    x, residual = (torch.randn(2, num_rows, n, generator=generator) * 5).to(device.name, dtype)
    weight = torch.randn(n, generator=generator).to(device.name, dtype)
    out = Guarded((num_rows, n), dtype, device)
    norms.rms_norm(out.tensor, x, weight, 1e-5)
    assert_close(out.tensor, REFERENCE.rms_norm(x.float(), weight.float(), 1e-5), TOLERANCE[dtype], device)
    out.assert_untouched_around()

    normed, total = Guarded((num_rows, n), dtype, device), Guarded((num_rows, n), dtype, device)
    norms.add_rms_norm(normed.holding(x), normed.tensor, total.holding(residual), weight, 1e-5)
    assert torch.equal(total.tensor, x + residual)
    assert_close(normed.tensor, REFERENCE.rms_norm(total.tensor.float(), weight.float(), 1e-5), TOLERANCE[dtype], device)
    normed.assert_untouched_around()
    total.assert_untouched_around()


def check_silu_mul(num_rows: int, n: int, dtype: torch.dtype, device: Device) -> None:
    gate_up = (torch.randn(num_rows, 2 * n, generator=device.generator()) * 4).to(device.name, dtype)
    out = Guarded((num_rows, n), dtype, device)
    silu_mul.silu_mul(out.tensor, gate_up)
    assert_close(out.tensor, REFERENCE.silu_mul(gate_up.float()), TOLERANCE[dtype], device)
    out.assert_untouched_around()


def check_skinny_linear(m: int, n: int, k: int, dtype: torch.dtype, device: Device, tile: skinny_linear.LinearTile | None = None) -> None:
    """With and without a bias, and twice the same bits."""
    generator = device.generator()
    x, weight = (torch.randn(rows, k, generator=generator).to(device.name, dtype) for rows in (m, n))
    for bias in (None, torch.randn(n, generator=generator).to(device.name, dtype) * k**0.5):
        out, again = Guarded((m, n), dtype, device), Guarded((m, n), dtype, device)
        for target in (out, again):
            skinny_linear.skinny_linear(target.tensor, x, weight, bias, tile)
            target.assert_untouched_around()
        expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert_close(out.tensor, expected, TOLERANCE[dtype], device)
        assert torch.equal(out.tensor, again.tensor)


def check_linear_silu_mul(m: int, n: int, k: int, dtype: torch.dtype, device: Device, tile: skinny_linear.LinearTile | None = None) -> None:
    """What the product and `silu_mul` one after the other give."""
    generator = device.generator()
    x, weight = torch.randn(m, k, generator=generator).to(device.name, dtype), torch.randn(2 * n, k, generator=generator) / k**0.5
    weight = weight.to(device.name, dtype)
    for bias in (None, torch.randn(2 * n, generator=generator).to(device.name, dtype)):
        out, expected = Guarded((m, n), dtype, device), torch.empty(m, n, dtype=dtype, device=device.name)
        skinny_linear.skinny_linear_silu_mul(out.tensor, x, weight, bias, tile)
        out.assert_untouched_around()
        silu_mul.silu_mul(expected, torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(dtype))
        assert_close(out.tensor, expected.double(), TOLERANCE[dtype], device)


def check_linear_add_rms_norm(
    m: int, n: int, k: int, dtype: torch.dtype, device: Device, tile: skinny_linear.LinearTile | None = None
) -> None:
    """The new residual bit for bit that of the kernels it is fused of, the norm near that of the reference."""
    generator = device.generator()
    x, weight, old, norm = (torch.randn(shape, generator=generator).to(device.name, dtype) for shape in ((m, k), (n, k), (m, n), (n,)))
    for bias in (None, torch.randn(n, generator=generator).to(device.name, dtype) * k**0.5):
        product = torch.empty(m, n, dtype=dtype, device=device.name)
        skinny_linear.skinny_linear(product, x, weight, bias, tile=tile)
        normed, total = Guarded((m, n), dtype, device), Guarded((m, n), dtype, device)
        parts = skinny_linear.partial_products(x, weight, tile=tile)
        norms.sum_add_rms_norm(normed.tensor, parts, bias, total.holding(old), norm, 1e-5)
        assert torch.equal(total.tensor, product + old)
        assert_close(normed.tensor, REFERENCE.rms_norm(total.tensor.float(), norm.float(), 1e-5), TOLERANCE[dtype], device)
        normed.assert_untouched_around()
        total.assert_untouched_around()


@dataclass(frozen=True)
class RopeCase:
    num_tokens: int
    heads: tuple[int, int] = (8, 2)
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    head_norms: bool = False
    padding: int = 0          # rows at the end that are nobody's: their slot is -1


def check_rope_write_kv(case: RopeCase, device: Device) -> None:
    """q in place; k and v at their slots and nowhere else, in a layer of their own, exactly as the pool's type rounds them. The same bits
    from the parts of a product.
    """
    generator, layer, num_blocks = device.generator(), 2, case.num_tokens // case.block_size + 3
    num_heads, kv_heads = case.heads
    parts = torch.randn(3, case.num_tokens, num_heads + 2 * kv_heads, case.head_dim, generator=generator).to(device.name)
    bias = torch.randn(num_heads + 2 * kv_heads, case.head_dim, generator=generator).to(device.name, case.dtype)
    qkv = (parts[0] + parts[1] + parts[2] + bias.float()).to(case.dtype)
    angles = torch.rand(50, case.head_dim // 2, generator=generator) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1).to(device.name)
    positions = torch.randint(0, 50, (case.num_tokens,), generator=generator).to(device.name)
    unused, *places = torch.randperm(num_blocks * case.block_size, generator=generator).tolist()
    slots = torch.tensor(places[: case.num_tokens - case.padding] + [-1] * case.padding, device=device.name)
    weights = torch.randn(2, case.head_dim, generator=generator).to(device.name, case.dtype)
    norms_of = {dtype: HeadNorms(*weights.to(dtype), 1e-6) if case.head_norms else None for dtype in (case.dtype, torch.float32)}
    pool = Guarded((num_blocks, 3, 2, kv_heads, case.block_size, case.head_dim), case.kv_dtype or case.dtype, device)
    scales = None if case.kv_dtype is None else (torch.rand(3, 2, kv_heads, generator=generator) / 90 + 0.0125).to(device.name)

    fused = qkv.clone()
    q, k, v = fused.split([num_heads, kv_heads, kv_heads], dim=1)
    rope_kv.rope_write_kv(q, k, v, norms_of[case.dtype], positions, cos_sin, pool.tensor, layer, slots, scales)

    expected_pool = torch.full(pool.tensor.shape, torch.nan, device=device.name)
    wide = [part.clone() for part in qkv.float().split([num_heads, kv_heads, kv_heads], dim=1)]
    real_slots = slots.where(slots >= 0, unused)          # the reference knows no padding: it goes where it is wiped again
    rotated = REFERENCE.rope_write_kv(*wide, norms_of[torch.float32], positions, cos_sin, expected_pool, layer, real_slots)
    expected_pool[unused // case.block_size, layer, :, :, unused % case.block_size] = torch.nan
    stored = pool.tensor.float() if scales is None else pool.tensor.float() * scales[None, :, :, :, None, None]
    written = ~expected_pool.isnan()
    assert torch.equal(~stored.isnan(), written), "another place of the pool was written, or one was not"
    tolerance = TOLERANCE[case.dtype]
    assert_close(fused[:, :num_heads], rotated, tolerance, device)
    assert_close(stored[written], expected_pool[written], tolerance if scales is None else 4e-2, device)
    pool.assert_untouched_around()

    out, again = Guarded(q.shape, case.dtype, device), Guarded(pool.tensor.shape, pool.tensor.dtype, device)
    heads, biases = (whole.split([num_heads, kv_heads, kv_heads], dim=-2) for whole in (parts, bias))
    rope_kv.sum_rope_write_kv(
        out.tensor, heads, biases, norms_of[case.dtype], positions, cos_sin, again.tensor, layer, slots, scales
    )
    assert torch.equal(out.tensor, fused[:, :num_heads])
    assert torch.equal(again.tensor.view(torch.uint8), pool.tensor.view(torch.uint8))
    out.assert_untouched_around()
    again.assert_untouched_around()


def check_rope_alone(case: RopeCase, device: Device) -> None:
    generator = device.generator()
    both = torch.randn(case.num_tokens, sum(case.heads), case.head_dim, generator=generator).to(device.name, case.dtype)
    q, k = both.split(case.heads, dim=1)
    positions, cos_sin = torch.arange(case.num_tokens, device=device.name), torch.randn(case.num_tokens, case.head_dim, generator=generator)
    expected = REFERENCE.rope(q.float(), k.float(), positions, cos_sin.to(device.name))
    rope_kv.rope(q, k, None, positions, cos_sin.to(device.name))
    assert_close(q, expected[0], TOLERANCE[case.dtype], device)
    assert_close(k, expected[1], TOLERANCE[case.dtype], device)


def check_padded_decode(device: Device) -> None:
    """A captured batch's padding (context 0, a table of zeros) becomes zeros and disturbs no other row."""
    case = AttentionCase(lengths=((1, 30), (1, 4), (1, 0)))
    inputs = attention_inputs(case, device)
    inputs.paging.context_lens[2] = 0
    for splits, num_sms in ((1, 132), (2, 132), (2, 2)):
        out = Guarded(inputs.q.shape, case.dtype, device)
        paging = with_share_list(inputs.paging, inputs.kv_pool.shape[3], splits, num_sms)
        decode_attention(out.tensor, inputs.q, inputs.kv_pool, inputs.layer, paging, case.scale, None, None, splits, num_sms=num_sms)
        alone = Paging(inputs.paging.query_starts[:3], inputs.paging.context_lens[:2], inputs.paging.block_tables[:2])
        expected = REFERENCE.paged_attention(inputs.q[:2], inputs.kv_pool, inputs.layer, alone, case.scale, None)
        assert_close(out.tensor[:2], expected, TOLERANCE[case.dtype], device)
        assert not out.tensor[2].any()
        out.assert_untouched_around()


def check_empty(device: Device) -> None:
    """No tokens: nothing is launched, shapes come back."""
    ops, int32, name = TritonOps(num_sms=1), torch.int32, device.name
    heads, pool = torch.empty(0, 4, 64, device=name), torch.empty(2, 1, 2, 4, 16, 64, device=name)
    positions, table = torch.empty(0, dtype=torch.int64, device=name), torch.empty(9, 64, device=name)
    paging = Paging(*(torch.zeros(shape, dtype=int32, device=name) for shape in ((1,), (0,), (0, 1))))
    rows, weight = torch.empty(0, 8, device=name), torch.ones(8, device=name)
    assert ops.rms_norm(rows, weight, 1e-5).shape == rows.shape
    assert ops.add_rms_norm(rows, rows, weight, 1e-5)[0].shape == rows.shape
    assert ops.silu_mul(rows).shape == (0, 4)
    assert ops.rope(heads, heads, positions, table)[0].shape == heads.shape
    assert ops.rope_write_kv(heads, heads, heads, None, positions, table, pool, 0, positions).shape == heads.shape
    ops.write_kv(pool, 0, heads, heads, positions)
    assert ops.paged_attention(heads, pool, 0, paging, 1.0, None).shape == heads.shape
