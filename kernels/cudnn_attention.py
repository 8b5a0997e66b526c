"""Attention of one whole, long prompt by cuDNN, through torch: it computes faster than `prefill_attention.py`, but reads no pages.

    pages ──gather──► K, V [kv_heads, rows, head_dim] ──► cuDNN, causal ◄── q, padded to whole tiles

Gathering takes two passes over the prompt's KV, so short prompts gain nothing. cuDNN plans each length by itself, which takes tens of
milliseconds: hence the padding, and `plan`.
"""

import torch
from torch import Tensor

FEWEST_ROWS = 7168          # from here on it was faster on an H200, padded or not
ROWS_OF_A_PLAN = 256


def suits(q: Tensor, kv_pool: Tensor) -> bool:
    """Whether q [T, heads, head_dim], all rows of one sequence, is to be computed here."""
    return len(q) >= FEWEST_ROWS and q.dtype is kv_pool.dtype and takes(kv_pool)


def takes(kv_pool: Tensor) -> bool:
    sixteen_bits, head_dim = kv_pool.dtype in (torch.bfloat16, torch.float16), kv_pool.shape[5]
    has_cudnn: bool = torch.backends.cudnn.is_available()      # type: ignore[no-untyped-call]
    return sixteen_bits and head_dim <= 128 and has_cudnn and torch.cuda.get_device_capability() >= (9, 0)


def plan(num_heads: int, kv_pool: Tensor, max_rows: int) -> None:
    """Makes the plans for all prompts of up to `max_rows` rows: whole tiles are read where they lie, others are copied."""
    kv_heads, block_size, head_dim = kv_pool.shape[3:]
    if not takes(kv_pool):
        return
    for rows in reversed(range(FEWEST_ROWS, max_rows + ROWS_OF_A_PLAN, ROWS_OF_A_PLAN)):      # the others fit into the longest's memory
        qkv = torch.zeros(rows, num_heads + 2 * kv_heads, head_dim, dtype=kv_pool.dtype, device=kv_pool.device)
        for q in (qkv[:, :num_heads], qkv[1:, :num_heads]):
            attention(q, kv_pool, 0, torch.zeros(-(-rows // block_size), dtype=torch.int32, device=kv_pool.device), 1.0)


def attention(q: Tensor, kv_pool: Tensor, layer: int, block_table: Tensor, scale: float) -> Tensor:
    """Causal attention of q [T, heads, head_dim], all rows of a sequence, over its KV → [T, heads, head_dim].

    block_table [max_blocks] int32: where the KV lies. kv_pool [num_blocks, num_layers, 2, kv_heads, block_size, head_dim], of q's type.
    """
    num_rows, num_heads, head_dim = q.shape
    kv_heads, block_size = kv_pool.shape[3:5]
    padded, num_blocks = -(-num_rows // ROWS_OF_A_PLAN) * ROWS_OF_A_PLAN, -(-num_rows // block_size)
    kv = torch.empty(2, kv_heads, padded, head_dim, dtype=q.dtype, device=q.device)
    pages = kv[:, :, : num_blocks * block_size].view(2, kv_heads, num_blocks, block_size, head_dim)
    pages.copy_(kv_pool[block_table[:num_blocks].long(), layer].permute(1, 2, 0, 3, 4))
    kv[:, :, num_rows:] = 0                  # no row that counts sees them, but zero times what was never written may be NaN
    if padded > num_rows:
        queries = torch.zeros(padded, num_heads, head_dim, dtype=q.dtype, device=q.device)
        queries[:num_rows] = q
        q = queries
    keys, values = kv[:, None]
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    out: Tensor = attend(q.transpose(0, 1)[None], keys, values, None, False, 0.0, True, False, scale=scale)[0]
    return out[0].transpose(0, 1)[:num_rows].contiguous()
