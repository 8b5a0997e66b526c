"""The `Ops` protocol over the Triton kernels, for one CUDA device. Nothing here waits for the device: a CUDA graph can capture all of it.

Two things padding rows of a captured graph rely on: a slot of -1 stores nothing, and a sequence of context 0 is answered with zeros.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cudnn_attention, rope_kv
from . import norms as norm_kernels
from .context_shares import most_shares
from .decode_attention import decode_attention, with_share_list
from .kv_storage import FP8
from .ops import HeadNorms, Paging, UnsupportedByKernels, split_heads
from .prefill_attention import prefill_attention
from .silu_mul import silu_mul
from .skinny_linear import partial_products, skinny_linear, skinny_linear_silu_mul, suits

HEAD_DIMS = (64, 96, 128, 256)
BLOCK_SIZES = (16, 32, 64)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonOps:
    """kv_scales [num_layers, 2, kv_heads] fp32: what keys and values of an fp8 pool were divided by when stored; None for 1."""

    def __init__(self, num_sms: int, kv_scales: Tensor | None = None) -> None:
        self._num_sms = num_sms
        self._kv_scales = kv_scales

    @classmethod
    def on(cls, device: torch.device, kv_scales: Tensor | None = None) -> "TritonOps":
        return cls(torch.cuda.get_device_properties(device).multi_processor_count, kv_scales)

    def prepare(self, num_heads: int, kv_pool: Tensor, max_rows: int) -> None:
        cudnn_attention.plan(num_heads, kv_pool, max_rows)

    def begin_step(self, paging: Paging, kv_pool: Tensor) -> Paging:
        if not paging.has_single_rows:
            return paging
        return with_share_list(paging, kv_pool.shape[3], self._splits(paging, kv_pool), self._num_sms)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not suits(x, weight):
            return F.linear(x, weight, bias)
        out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
        skinny_linear(out, x, weight, bias)
        return out

    def logits(self, x: Tensor, head: Tensor, vocab: int) -> Tensor:
        return self.linear(x, head, None)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if x.numel():
            norm_kernels.rms_norm(out.view(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]), weight, eps)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if x.numel():
            norm_kernels.add_rms_norm(x, x, residual, weight, eps)
        return x, residual

    def rope(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
        if len(q):
            rope_kv.rope(q, k, None, positions, cos_sin)
        return q, k

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        out = torch.empty(len(gate_up), gate_up.shape[1] // 2, dtype=gate_up.dtype, device=gate_up.device)
        if len(out):
            silu_mul(out, gate_up)
        return out

    def linear_silu_mul(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not suits(x, weight):
            return self.silu_mul(F.linear(x, weight, bias))
        out = torch.empty(len(x), len(weight) // 2, dtype=x.dtype, device=x.device)
        skinny_linear_silu_mul(out, x, weight, bias)
        return out

    def linear_add_rms_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        if not suits(x, weight):
            return self.add_rms_norm(F.linear(x, weight, bias), residual, norm_weight, eps)
        normed = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
        norm_kernels.sum_add_rms_norm(normed, partial_products(x, weight), bias, residual, norm_weight, eps)
        return normed, residual

    def write_kv(self, kv_pool: Tensor, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        self._check(k, kv_pool)
        if len(k):
            rope_kv.write_kv(kv_pool, layer, k, v, slots, self._kv_scales)

    def rope_write_kv(
        self, q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms | None, positions: Tensor, cos_sin: Tensor,
        kv_pool: Tensor, layer: int, slots: Tensor,
    ) -> Tensor:  # fmt: skip
        self._check(q, kv_pool)
        if len(q):
            rope_kv.rope_write_kv(q, k, v, norms, positions, cos_sin, kv_pool, layer, slots, self._kv_scales)
        return q

    def linear_rope_write_kv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, norms: HeadNorms | None, positions: Tensor, cos_sin: Tensor,
        kv_pool: Tensor, layer: int, slots: Tensor,
    ) -> Tensor:  # fmt: skip
        if not suits(x, weight):
            return self.rope_write_kv(*split_heads(F.linear(x, weight, bias), kv_pool), norms, positions, cos_sin, kv_pool, layer, slots)
        parts = split_heads(partial_products(x, weight), kv_pool)
        q = torch.empty(parts[0].shape[1:], dtype=x.dtype, device=x.device)
        self._check(q, kv_pool)
        biases = None if bias is None else split_heads(bias, kv_pool)
        rope_kv.sum_rope_write_kv(q, parts, biases, norms, positions, cos_sin, kv_pool, layer, slots, self._kv_scales)
        return q

    def paged_attention(self, q: Tensor, kv_pool: Tensor, layer: int, paging: Paging, scale: float, window: int | None) -> Tensor:
        self._check(q, kv_pool)
        if paging.is_whole_prompt and window is None and cudnn_attention.suits(q, kv_pool):
            return cudnn_attention.attention(q, kv_pool, layer, paging.block_tables[0], scale)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if not len(q):
            return out
        splits = self._splits(paging, kv_pool)
        if paging.has_single_rows:
            decode_attention(out, q, kv_pool, layer, paging, scale, window, self._kv_scales, splits, num_sms=self._num_sms)
        if len(q) > len(paging.context_lens):      # some sequence has more than one row
            prefill_attention(out, q, kv_pool, layer, paging, scale, window, self._kv_scales, num_sms=self._num_sms)
        return out

    def _splits(self, paging: Paging, kv_pool: Tensor) -> int:
        max_context = paging.block_tables.shape[1] * kv_pool.shape[4]
        return most_shares(len(paging.context_lens), kv_pool.shape[3], max_context, self._num_sms)

    def _check(self, heads: Tensor, kv_pool: Tensor) -> None:
        """heads: q or k, [T, its heads, head_dim]."""
        check_supported(kv_pool.shape[5], kv_pool.shape[4], heads.dtype, kv_pool.dtype)
        assert kv_pool.dtype is FP8 or self._kv_scales is None, f"scales for a pool of {kv_pool.dtype}"
        assert heads.shape[2] == kv_pool.shape[5], f"head_dim {heads.shape[2]} for a pool of {kv_pool.shape[5]}"
        assert heads.stride(2) == 1, "a head is not contiguous"
        assert kv_pool.is_contiguous()


def check_supported(head_dim: int, block_size: int, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """Raises UnsupportedByKernels, before anything is compiled or allocated."""
    if head_dim not in HEAD_DIMS:
        raise UnsupportedByKernels(f"head_dim {head_dim}: the CUDA kernels take {_listed(HEAD_DIMS)}")
    if block_size not in BLOCK_SIZES:
        raise UnsupportedByKernels(f"block_size {block_size}: the CUDA kernels take {_listed(BLOCK_SIZES)}")
    if dtype not in DTYPES:
        raise UnsupportedByKernels(f"dtype {dtype}: the CUDA kernels take {_listed(DTYPES)}")
    if kv_dtype not in (dtype, FP8):
        raise UnsupportedByKernels(f"KV of {kv_dtype} for a model of {dtype}: the CUDA kernels take {dtype}, or {FP8} with scales")


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values))
