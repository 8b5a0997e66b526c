"""The operations a model is made of. `models/` sees this protocol alone, so that a device's kernels are a constructor argument.

KV pool, everywhere: `[num_blocks, num_layers, 2, kv_heads, block_size, head_dim]`, K at index 0 and V at 1 of the third dimension.
A slot is `block_id * block_size + offset`: one token's place in the pool, the same for all layers.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Paging:
    """Which query rows belong to which of B sequences, and where each sequence's keys and values lie."""

    query_starts: Tensor      # [B+1] int32: rows query_starts[i] to query_starts[i+1], one at least, are sequence i's newest tokens
    context_lens: Tensor      # [B] int32: tokens in the KV cache, those of this step included
    block_tables: Tensor      # [B, max_blocks] int32: padding is 0 and is never used
    has_single_rows: bool = True      # False: no sequence has exactly one query row, so that nothing is launched for such
    is_whole_prompt: bool = False     # one sequence, more than one row, and its rows are all of its context
    share_tokens: Tensor | None = None    # [1] int32: how long shares of single rows' contexts should be (context_shares.py); None: short
    share_list: Tensor | None = None      # of `begin_step`: which shares there are (decode_attention.py); None: they are looked for


@dataclass(frozen=True)
class HeadNorms:
    """The RMSNorm of every query head and every key head that some models put before the rotation."""

    q: Tensor                 # [head_dim]
    k: Tensor                 # [head_dim]
    eps: float


def split_heads(qkv: Tensor, kv_pool: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[..., (heads + 2 kv_heads) head_dim] → views of q [..., heads, head_dim] and of k and v [..., kv_heads, head_dim]."""
    kv_heads, head_dim = kv_pool.shape[3], kv_pool.shape[5]
    heads = qkv.view(*qkv.shape[:-1], -1, head_dim)
    q, k, v = torch.split(heads, [heads.shape[-2] - 2 * kv_heads, kv_heads, kv_heads], dim=-2)
    return q, k, v


class UnsupportedByKernels(ValueError):
    """This device's kernels cannot take a model's shape or type; the text names it and what they take."""


class Ops(Protocol):
    """Results have the input's dtype. Arguments are left as they were, except where an operation says that it may overwrite them."""

    def prepare(self, num_heads: int, kv_pool: Tensor, max_rows: int) -> None:
        """Whatever takes long when it is done first: to be called before steps of up to `max_rows` rows are served."""
        ...

    def begin_step(self, paging: Paging, kv_pool: Tensor) -> Paging:
        """`paging` with what is worth working out once for all layers of a step."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x weightᵀ + bias`, sums in fp32. x [T, k], weight [n, k], bias [n] → [T, n]."""
        ...

    def logits(self, x: Tensor, head: Tensor, vocab: int) -> Tensor:
        """`x headᵀ`: x [R, k] → [R, vocab]. Of several ranks each has some rows of the head, and only the first gets all logits."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`x / sqrt(mean(x²) + eps) * weight` over the last dimension, in fp32 inside. x [..., n], weight [n] → [..., n]."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`s = x + residual` → (rms_norm(s), s), all [T, n]. May overwrite x and residual."""
        ...

    def rope(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary embedding, Hugging Face's half-rotation: dimension j turns with dimension j + head_dim / 2.

        q [T, heads, head_dim], k [T, kv_heads, head_dim], positions [T] int64, cos_sin [max_position, head_dim] fp32 with the
        cosines in the first half of the last dimension and the sines in the second. May overwrite q and k.
        """
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """`silu(gate) * up` with gate_up = [gate | up]: [T, 2n] → [T, n]."""
        ...

    def linear_silu_mul(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What begins the MLP, as one operation: silu_mul(linear(x)). x [T, k], weight [2n, k], bias [2n] → [T, n]."""
        ...

    def linear_add_rms_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """What ends attention and the MLP, as one operation: add_rms_norm of linear(x) and the residual. May overwrite the residual. Of
        several ranks each has some columns of x and of the weight: their products are added up, then the bias."""
        ...

    def write_kv(self, kv_pool: Tensor, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Stores k, v [T, kv_heads, head_dim] of one layer at slots [T] int64, which are distinct."""
        ...

    def rope_write_kv(
        self, q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms | None, positions: Tensor, cos_sin: Tensor,
        kv_pool: Tensor, layer: int, slots: Tensor,
    ) -> Tensor:  # fmt: skip
        """What happens between the projection and attention, as one operation: q and k are normed, if the model has `norms`, and rotated;
        k and v are stored → q. May overwrite q, k and v.
        """
        ...

    def linear_rope_write_kv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, norms: HeadNorms | None, positions: Tensor, cos_sin: Tensor,
        kv_pool: Tensor, layer: int, slots: Tensor,
    ) -> Tensor:  # fmt: skip
        """What begins attention, as one operation: rope_write_kv of [q | k | v] = linear(x) → q [T, heads, head_dim]."""
        ...

    def paged_attention(self, q: Tensor, kv_pool: Tensor, layer: int, paging: Paging, scale: float, window: int | None) -> Tensor:
        """Causal attention of q [T, heads, head_dim] over the paged KV → [T, heads, head_dim].

        The last query row of a sequence sits at position context_len - 1. Query head h reads KV head h // (heads / kv_heads).
        With a window, a query at position p sees the keys at positions p - window + 1 to p.
        """
        ...
