"""What happens to q, k and v between the projection and attention, in one pass over them.

    q ──(norm)── rotate ──► q, in place           k ──(norm)── rotate ──► k in place, or into the KV pool           v ──► into the KV pool

Rotary embedding (Su et al., arXiv 2104.09864) in Hugging Face's half-rotation: dimension j turns with dimension j + head_dim / 2. The norm
is Qwen3's RMSNorm of each head. A program takes one token and up to 8 heads of one of the three. Rounding is that of the reference,
which rounds to the input's type after the norm, after its weight and after the rotation; fp8 is stored divided by its scale, saturating.

q, k and v may come as the parts of a product (`skinny_linear.py`), added here in their order and rounded as the product would have been.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl
from torch import Tensor

from .ops import HeadNorms
from .overlap import after_predecessor, overlapping

MAX_HEADS = 8                 # of a program
FEW_TOKENS = 256              # up to here programs are smaller, to be more: faster by 1 µs in a decode step, and twice as slow for a prompt


Heads = tuple[Tensor, Tensor, Tensor]      # of q, k and v: [T, heads, head_dim] and twice [T, kv_heads, head_dim], perhaps in parts before


def rope(q: Tensor, k: Tensor, norms: HeadNorms | None, positions: Tensor, cos_sin: Tensor) -> None:
    """Norms and rotates q [T, heads, head_dim] and k [T, kv_heads, head_dim] in place; positions [T] int64, cos_sin as in `Ops.rope`."""
    _launch(q, (q, k, k), None, norms, positions, cos_sin, None, 0, positions, None)


def rope_write_kv(
    q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms | None, positions: Tensor, cos_sin: Tensor,
    kv_pool: Tensor, layer: int, slots: Tensor, kv_scales: Tensor | None,
) -> None:  # fmt: skip
    """Norms and rotates q in place; stores k normed and rotated, and v, at slots [T] int64. A negative slot stores nothing.

    kv_pool [num_blocks, num_layers, 2, kv_heads, block_size, head_dim], contiguous; kv_scales [num_layers, 2, kv_heads] fp32, None for 1.
    """
    _launch(q, (q, k, v), None, norms, positions, cos_sin, kv_pool, layer, slots, kv_scales)


def sum_rope_write_kv(
    out: Tensor, parts: Heads, biases: Heads | None, norms: HeadNorms | None, positions: Tensor, cos_sin: Tensor,
    kv_pool: Tensor, layer: int, slots: Tensor, kv_scales: Tensor | None,
) -> None:  # fmt: skip
    """rope_write_kv of sums: q, k and v in parts, [any number, T, …] fp32, and their biases without T. What becomes of q goes to `out`."""
    _launch(out, parts, biases, norms, positions, cos_sin, kv_pool, layer, slots, kv_scales)


def write_kv(kv_pool: Tensor, layer: int, k: Tensor, v: Tensor, slots: Tensor, kv_scales: Tensor | None) -> None:
    """Stores k and v as they are: the same pass without q, norm and rotation."""
    _launch(k[:, :0], (k[:, :0], k, v), None, None, slots, None, kv_pool, layer, slots, kv_scales)


def _launch(
    out: Tensor, heads: Heads, biases: Heads | None, norms: HeadNorms | None, positions: Tensor, cos_sin: Tensor | None,
    kv_pool: Tensor | None, layer: int, slots: Tensor, kv_scales: Tensor | None,
) -> None:  # fmt: skip
    num_tokens, num_heads, head_dim = out.shape
    q, k, v = heads
    kv_heads = k.shape[-2]
    most = MAX_HEADS if num_tokens > FEW_TOKENS else MAX_HEADS // 2
    chunk = min(most, triton.next_power_of_2(max(num_heads, kv_heads)))
    kv_programs = triton.cdiv(kv_heads, chunk) * (1 if kv_pool is None else 2)
    _rope_kernel[(num_tokens, triton.cdiv(num_heads, chunk) + kv_programs)](
        out, q, k, v, *(biases or (None, None, None)), norms and norms.q, norms and norms.k, norms.eps if norms else 0.0,
        positions, cos_sin, kv_pool, slots, None if kv_scales is None else kv_scales[layer],
        0 if kv_pool is None else layer * kv_pool.stride(1), 0 if kv_pool is None else kv_pool.stride(0),
        num_heads, kv_heads, out.stride(0), out.stride(1), *q.stride()[-3:-1], *k.stride()[-3:-1], *v.stride()[-3:-1],
        q.stride(0) if q.dim() == 4 else 0, PARTS=len(q) if q.dim() == 4 else 1,
        HEADS=chunk, BLOCK_SIZE=1 if kv_pool is None else kv_pool.shape[4],
        HEAD_DIM=head_dim, HALF_WIDTH=triton.next_power_of_2(head_dim // 2), num_warps=1, **overlapping(),
    )  # fmt: skip


@triton.jit
def _rope_kernel(
    out, q, k, v, q_bias, k_bias, v_bias, q_norm, k_norm, eps, positions, cos_sin, kv_pool, slots, kv_scales, layer_offset, block_stride,
    num_heads, kv_heads, out_row_stride, out_head_stride, q_row_stride, q_head_stride, k_row_stride, k_head_stride,
    v_row_stride, v_head_stride, part_stride, PARTS: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HALF_WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (token, chunk of heads): first the chunks of q, then those of k, then those of v."""
    after_predecessor(PDL)
    token, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q_chunks, kv_chunks = tl.cdiv(num_heads, HEADS), tl.cdiv(kv_heads, HEADS)
    dtype: tl.constexpr = out.dtype.element_ty
    if chunk < q_chunks:
        places, there = _head_places(q_head_stride, chunk, num_heads, HEADS, HEAD_DIM, HALF_WIDTH)
        pointers = q + token * q_row_stride + places
        first, second = _sum(pointers, there, q_bias, chunk, part_stride, dtype, PARTS, HEADS, HEAD_DIM, HALF_WIDTH)
        first, second = _norm(first, second, q_norm, eps, dtype, HEAD_DIM, HALF_WIDTH)
        first, second = _rotate(first, second, token, positions, cos_sin, HEAD_DIM, HALF_WIDTH)
        places, there = _head_places(out_head_stride, chunk, num_heads, HEADS, HEAD_DIM, HALF_WIDTH)
        _store(out + token * out_row_stride + places, first, second, there, HEAD_DIM)
    elif chunk < q_chunks + kv_chunks:
        chunk -= q_chunks
        places, there = _head_places(k_head_stride, chunk, kv_heads, HEADS, HEAD_DIM, HALF_WIDTH)
        pointers = k + token * k_row_stride + places
        first, second = _sum(pointers, there, k_bias, chunk, part_stride, dtype, PARTS, HEADS, HEAD_DIM, HALF_WIDTH)
        first, second = _norm(first, second, k_norm, eps, dtype, HEAD_DIM, HALF_WIDTH)
        first, second = _rotate(first, second, token, positions, cos_sin, HEAD_DIM, HALF_WIDTH)
        if kv_pool is None:
            _store(pointers, first, second, there, HEAD_DIM)
        else:
            first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
            _store_page(kv_pool + layer_offset, slots, kv_scales, token, chunk, block_stride, kv_heads, 0, first, second, there,
                        HEADS, BLOCK_SIZE, HEAD_DIM, HALF_WIDTH)  # fmt: skip
    elif kv_pool is not None:
        chunk -= q_chunks + kv_chunks
        places, there = _head_places(v_head_stride, chunk, kv_heads, HEADS, HEAD_DIM, HALF_WIDTH)
        pointers = v + token * v_row_stride + places
        first, second = _sum(pointers, there, v_bias, chunk, part_stride, dtype, PARTS, HEADS, HEAD_DIM, HALF_WIDTH)
        _store_page(kv_pool + layer_offset, slots, kv_scales, token, chunk, block_stride, kv_heads, 1, first, second, there,
                    HEADS, BLOCK_SIZE, HEAD_DIM, HALF_WIDTH)  # fmt: skip


@triton.jit
def _head_places(head_stride, chunk, num_heads, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF_WIDTH: tl.constexpr):
    """Where in a token's row the first halves of a chunk of heads lie, and which of them exist: [HEADS, HALF_WIDTH]."""
    heads = (chunk * HEADS + tl.arange(0, HEADS))[:, None]
    columns = tl.arange(0, HALF_WIDTH)[None, :]
    return heads * head_stride + columns, (heads < num_heads) & (columns < HEAD_DIM // 2)


@triton.jit
def _sum(
    pointers, there, bias, chunk, part_stride, dtype: tl.constexpr,
    PARTS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF_WIDTH: tl.constexpr,
):  # fmt: skip
    first, second = _load(pointers, there, HEAD_DIM)
    for part in tl.static_range(1, PARTS):
        more = _load(pointers + part * part_stride, there, HEAD_DIM)
        first, second = first + more[0], second + more[1]
    if bias is not None:
        heads = (chunk * HEADS + tl.arange(0, HEADS))[:, None]
        more = _load(bias + heads * HEAD_DIM + tl.arange(0, HALF_WIDTH)[None, :], there, HEAD_DIM)
        first, second = first + more[0], second + more[1]
    return first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)


@triton.jit
def _load(pointers, there, HEAD_DIM: tl.constexpr):
    first = tl.load(pointers, mask=there, other=0.0).to(tl.float32)
    return first, tl.load(pointers + HEAD_DIM // 2, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _store(pointers, first, second, there, HEAD_DIM: tl.constexpr):
    tl.store(pointers, first.to(pointers.dtype.element_ty), mask=there)
    tl.store(pointers + HEAD_DIM // 2, second.to(pointers.dtype.element_ty), mask=there)


@triton.jit
def _norm(first, second, weight, eps, dtype: tl.constexpr, HEAD_DIM: tl.constexpr, HALF_WIDTH: tl.constexpr):
    if weight is not None:
        inverse = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / HEAD_DIM + eps)[:, None]
        columns = tl.arange(0, HALF_WIDTH)
        first_weight, second_weight = _load(weight + columns, columns < HEAD_DIM // 2, HEAD_DIM)
        first = ((first * inverse).to(dtype).to(tl.float32) * first_weight[None, :]).to(dtype).to(tl.float32)
        second = ((second * inverse).to(dtype).to(tl.float32) * second_weight[None, :]).to(dtype).to(tl.float32)
    return first, second


@triton.jit
def _rotate(first, second, token, positions, cos_sin, HEAD_DIM: tl.constexpr, HALF_WIDTH: tl.constexpr):
    if cos_sin is not None:
        columns = tl.arange(0, HALF_WIDTH)
        cos, sin = _load(cos_sin + tl.load(positions + token) * HEAD_DIM + columns, columns < HEAD_DIM // 2, HEAD_DIM)
        cos, sin = cos[None, :], sin[None, :]
        first, second = first * cos - second * sin, second * cos + first * sin
    return first, second


@triton.jit
def _store_page(
    layer_pool, slots, kv_scales, token, chunk, block_stride, kv_heads, WHICH: tl.constexpr, first, second, there,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HALF_WIDTH: tl.constexpr,
):  # fmt: skip
    """A chunk's heads into the token's slot, as keys (WHICH 0) or values (1)."""
    heads = chunk * HEADS + tl.arange(0, HEADS)
    if kv_scales is not None:
        inverse = 1.0 / tl.load(kv_scales + WHICH * kv_heads + heads, mask=heads < kv_heads, other=1.0)[:, None]
        first, second = first * inverse, second * inverse
    slot = tl.load(slots + token)
    page = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * HEAD_DIM
    pages = layer_pool + page + ((WHICH * kv_heads + heads) * (BLOCK_SIZE * HEAD_DIM))[:, None]
    _store(pages + tl.arange(0, HALF_WIDTH)[None, :], first, second, there & (slot >= 0), HEAD_DIM)
