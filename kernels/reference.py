"""Every operation in plain torch: the path of a CPU worker, and what a GPU kernel is compared with.

Attention gathers a sequence's blocks into contiguous keys and values, then calls torch. Sequences with one query row (decodes) are
padded to a common context and computed together; longer chunks go one by one, so that a chunk's cost does not depend on its mates.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import Paging


class ReferenceOps:
    """The `Ops` protocol over torch; works on any device, is meant for CPUs."""

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

    def write_kv(self, kv_pool: Tensor, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        block_size = kv_pool.shape[4]
        blocks, offsets = slots // block_size, slots % block_size
        kv_pool[:, layer, 0][blocks, :, offsets] = k
        kv_pool[:, layer, 1][blocks, :, offsets] = v

    def paged_attention(self, q: Tensor, kv_pool: Tensor, layer: int, paging: Paging, scale: float, window: int | None) -> Tensor:
        starts, contexts = paging.query_starts.tolist(), paging.context_lens.tolist()
        chunks = [(i, starts[i], starts[i + 1]) for i in range(len(contexts))]
        singles = [i for i, begin, end in chunks if end - begin == 1]
        kv, out = kv_pool[:, layer], torch.empty_like(q)
        if singles:
            rows = paging.query_starts[singles]
            out[rows] = _decode(q[rows], kv, paging.block_tables[singles], paging.context_lens[singles], scale, window)
        for i, begin, end in chunks:
            if end - begin > 1:
                out[begin:end] = _chunk(q[begin:end], kv, paging.block_tables[i], contexts[i], scale, window)
        return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _decode(q: Tensor, kv: Tensor, tables: Tensor, context_lens: Tensor, scale: float, window: int | None) -> Tensor:
    """One query row for each of S sequences: q [S, heads, head_dim], tables [S, max_blocks] → [S, heads, head_dim]."""
    longest = int(context_lens.max())
    keys, values = _gather(kv, tables, longest)
    inside = torch.arange(longest, device=q.device) < context_lens[:, None]     # [S, longest]
    # What lies past a context is somebody else's or was never written, and NaN times a weight of zero is NaN.
    keys, values = (x.masked_fill(~inside[:, None, :, None], 0) for x in (keys, values))
    visible = _visible(context_lens[:, None] - 1, longest, window)              # [S, 1, longest]
    return _attend(q[:, None], keys, values, visible, scale)[:, 0]


def _chunk(q: Tensor, kv: Tensor, table: Tensor, context_len: int, scale: float, window: int | None) -> Tensor:
    """The newest T tokens of one sequence: q [T, heads, head_dim], table [max_blocks] → [T, heads, head_dim]."""
    keys, values = _gather(kv, table[None], context_len)
    positions = torch.arange(context_len - q.shape[0], context_len, device=q.device)
    return _attend(q[None], keys, values, _visible(positions[None], context_len, window), scale)[0]


def _gather(kv: Tensor, tables: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Pages of S sequences as contiguous keys and values: kv [num_blocks, 2, kv_heads, block_size, head_dim] of one layer,
    tables [S, max_blocks] → two of [S, kv_heads, length, head_dim]."""
    block_size = kv.shape[3]
    num_blocks = -(-length // block_size)
    pages = kv[tables[:, :num_blocks]].permute(2, 0, 3, 1, 4, 5)                # [2, S, kv_heads, num_blocks, block_size, head_dim]
    keys, values = pages.flatten(3, 4)[:, :, :, :length]
    return keys, values


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
