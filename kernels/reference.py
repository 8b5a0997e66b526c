"""Every operation in plain torch: the path of a CPU worker, and what a GPU kernel is compared with.

Attention gathers a sequence's blocks into contiguous keys and values, then calls torch. Sequences with one query row (decodes) are
padded to a common context and computed together; longer chunks go one by one, so that a chunk's cost does not depend on its mates.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .kv_storage import loaded, stored
from .ops import HeadNorms, Paging, split_heads


class ReferenceOps:
    """The `Ops` protocol over torch; works on any device, is meant for CPUs. The KV pool may be of any type that torch can round to;
    kv_scales [num_layers, 2, kv_heads] fp32 are for fp8, None for 1."""

    def __init__(self, kv_scales: Tensor | None = None) -> None:
        self._kv_scales = kv_scales

    def prepare(self, num_heads: int, kv_pool: Tensor, max_rows: int) -> None:
        pass

    def begin_step(self, paging: Paging, kv_pool: Tensor) -> Paging:
        return paging

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def logits(self, x: Tensor, head: Tensor, vocab: int) -> Tensor:
        return F.linear(x, head)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def rope(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos_sin[positions, None].chunk(2, dim=-1)            # [T, 1, head_dim / 2] each
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def linear_silu_mul(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.silu_mul(self.linear(x, weight, bias))

    def linear_add_rms_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return self.add_rms_norm(self.linear(x, weight, bias), residual, norm_weight, eps)

    def write_kv(self, kv_pool: Tensor, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        block_size = kv_pool.shape[4]
        blocks, offsets = slots // block_size, slots % block_size
        for which, heads in enumerate((k, v)):
            scales = None if self._kv_scales is None else self._kv_scales[layer, which, :, None]
            kv_pool[:, layer, which][blocks, :, offsets] = stored(heads, kv_pool.dtype, scales)

    def rope_write_kv(
        self, q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms | None, positions: Tensor, cos_sin: Tensor,
        kv_pool: Tensor, layer: int, slots: Tensor,
    ) -> Tensor:  # fmt: skip
        if norms is not None:
            q, k = self.rms_norm(q, norms.q, norms.eps), self.rms_norm(k, norms.k, norms.eps)
        q, k = self.rope(q, k, positions, cos_sin)
        self.write_kv(kv_pool, layer, k, v, slots)
        return q

    def linear_rope_write_kv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, norms: HeadNorms | None, positions: Tensor, cos_sin: Tensor,
        kv_pool: Tensor, layer: int, slots: Tensor,
    ) -> Tensor:  # fmt: skip
        q, k, v = split_heads(self.linear(x, weight, bias), kv_pool)
        return self.rope_write_kv(q, k, v, norms, positions, cos_sin, kv_pool, layer, slots)

    def paged_attention(self, q: Tensor, kv_pool: Tensor, layer: int, paging: Paging, scale: float, window: int | None) -> Tensor:
        contexts, out = paging.context_lens.tolist(), torch.empty_like(q)
        for ids, num_rows in _groups(paging):
            newest = torch.arange(num_rows, device=q.device)
            rows = paging.query_starts[ids, None] + newest                                  # [S, num_rows]
            positions = paging.context_lens[ids, None] - num_rows + newest                  # [S, num_rows]
            kv = _gather(kv_pool, layer, paging.block_tables[ids], [contexts[i] for i in ids])
            scales = None if self._kv_scales is None else self._kv_scales[layer, :, None, :, None, None]
            keys, values = loaded(kv, q.dtype, scales)
            out[rows] = _attend(q[rows], keys, values, _visible(positions, keys.shape[2], window), scale)
        return out


def _groups(paging: Paging) -> Iterator[tuple[list[int], int]]:
    """Sequences that are computed together, with their common number of query rows."""
    lengths = paging.query_starts.diff().tolist()
    if singles := [i for i, length in enumerate(lengths) if length == 1]:
        yield singles, 1
    for i, length in enumerate(lengths):
        if length > 1:
            yield [i], length


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _gather(kv_pool: Tensor, layer: int, tables: Tensor, contexts: list[int]) -> Tensor:
    """One layer's KV of S sequences, zero-padded to the longest context C: tables [S, max_blocks] → [2, S, kv_heads, C, head_dim].

    What the pool holds past a context is somebody else's or was never written, and even a weight of zero times NaN would be NaN.
    """
    _, num_layers, _, kv_heads, block_size, head_dim = kv_pool.shape
    longest = max(contexts)
    num_blocks = -(-longest // block_size)
    # One row a (block, layer, K or V, head), taken straight into the wanted order: 15 times faster than indexing the pool and permuting.
    rows = kv_pool.view(-1, block_size * head_dim)
    first = (tables[:, :num_blocks].long() * num_layers + layer) * 2 * kv_heads                         # [S, num_blocks]
    index = first[:, None] + torch.arange(2 * kv_heads, device=rows.device).view(2, 1, kv_heads, 1)     # [2, S, kv_heads, num_blocks]
    pages = rows.index_select(0, index.flatten())
    kv = pages.view(2, len(contexts), kv_heads, num_blocks * block_size, head_dim)[:, :, :, :longest]
    for i, context in enumerate(contexts):
        kv[:, i, :, context:] = 0
    return kv


def _visible(positions: Tensor, length: int, window: int | None) -> Tensor:
    """Which of `length` keys the queries at positions [S, T] see → bool [S, T, length]."""
    keys = torch.arange(length, device=positions.device)
    distance = positions[:, :, None] - keys
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _attend(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
    """q [S, T, heads, head_dim], keys and values [S, kv_heads, C, head_dim], visible [S, T, C] → [S, T, heads, head_dim].

    The query heads that share a KV head are stacked as further query rows, so that keys and values are never repeated.
    """
    num_seqs, num_rows, num_heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    group = num_heads // kv_heads
    grouped = q.view(num_seqs, num_rows, kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    stacked = grouped.reshape(num_seqs, kv_heads, group * num_rows, head_dim)
    mask = visible[:, None].repeat(1, 1, group, 1)                              # [S, 1, group * T, C]
    out = F.scaled_dot_product_attention(stacked, keys, values, attn_mask=mask, scale=scale)
    return out.view(num_seqs, kv_heads, group, num_rows, head_dim).permute(0, 3, 1, 2, 4).flatten(2, 3)
