"""The one dense decoder: Llama, Mistral, Qwen2 and Qwen3 are its configurations.

    embedding → layers × (norm → attention → + → norm → gated MLP → +) → norm → lm_head

Each product is one operation with what follows it (rotation and KV, the gate, the residual and the next norm), so a layer hands the next
one its input already normed.
Inference only; the device's kernels come in as `Ops`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.ops import HeadNorms, Ops, Paging
from .batch import ForwardBatch
from .config import ModelConfig
from .rope import rope_table
from .weights import LayerWeights, ModelWeights


class Transformer:
    """A model on its device, or one rank's part of it. Its methods change nothing but the KV pool that they are given."""

    def __init__(self, config: ModelConfig, weights: ModelWeights[Tensor], ops: Ops) -> None:
        self.config = config
        self._weights = weights
        self._ops = ops
        self._cos_sin = rope_table(config.rope, config.head_dim, config.max_position_embeddings).to(weights.embedding.device)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv_pool: Tensor, on_layer: Callable[[int], None] | None = None) -> Tensor:
        """Writes the batch's KV into the pool → logits [R, vocab] of `batch.logit_rows`. As one of several ranks it must be called for the
        same batch in all of them, with the rank's own pool; what the others than the first return means nothing.

        kv_pool: [num_blocks, num_layers, 2, kv_heads, block_size, head_dim]. `on_layer(i)` is called when layer i has finished and its KV
        is in the pool (on a GPU: when that work has been queued), so that its pages can leave while later layers compute.
        """
        weights, ops, eps = self._weights, self._ops, self.config.rms_norm_eps
        paging = ops.begin_step(batch.paging, kv_pool)
        next_norms = [layer.attention_norm for layer in weights.layers[1:]] + [weights.norm]
        residual = F.embedding(batch.token_ids, weights.embedding)
        normed = ops.rms_norm(residual, weights.layers[0].attention_norm, eps)
        for i, layer in enumerate(weights.layers):
            attended = self._attention(i, layer, normed, batch, paging, kv_pool)
            normed, residual = ops.linear_add_rms_norm(attended, layer.out, layer.out_bias, residual, layer.mlp_norm, eps)
            gated = ops.linear_silu_mul(normed, layer.gate_up, layer.gate_up_bias)
            normed, residual = ops.linear_add_rms_norm(gated, layer.down, layer.down_bias, residual, next_norms[i], eps)
            if on_layer is not None:
                on_layer(i)
        head = weights.embedding if weights.lm_head is None else weights.lm_head
        return ops.logits(normed if batch.logit_rows is None else normed[batch.logit_rows], head, self.config.vocab_size)

    def _attention(
        self, index: int, layer: LayerWeights[Tensor], normed: Tensor, batch: ForwardBatch, paging: Paging, kv_pool: Tensor
    ) -> Tensor:
        config, ops = self.config, self._ops
        norms = None
        if layer.q_norm is not None and layer.k_norm is not None:
            norms = HeadNorms(layer.q_norm, layer.k_norm, config.rms_norm_eps)
        q = ops.linear_rope_write_kv(normed, layer.qkv, layer.qkv_bias, norms, batch.positions, self._cos_sin, kv_pool, index, batch.slots)
        return ops.paged_attention(q, kv_pool, index, paging, config.head_dim**-0.5, config.windows[index]).flatten(1)
