"""A small random model over two sets of operations: what the kernels compute together, in prefill, mixed and decode batches."""

import torch
from torch import Tensor

from diptych.kernels.ops import Ops
from diptych.models.batch import ForwardBatch
from diptych.models.config import ModelConfig
from diptych.models.rope import RopeConfig
from diptych.models.transformer import Transformer
from diptych.models.weights import ModelWeights, weight_plan

BLOCK_SIZE = 16
CONFIG = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=97,
    hidden_size=96,
    intermediate_size=160,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    rms_norm_eps=1e-6,
    rope=RopeConfig(theta=10000.0),
    windows=(None, 20),
    qkv_bias=True,
    out_bias=False,
    mlp_bias=False,
    qk_norm=True,
    tie_embeddings=True,
    max_position_embeddings=128,
    dtype=torch.float32,
    eos_token_ids=(),
)

# Steps of (sequence, its new tokens): two prompts, then a chunk beside a decode, then decodes alone.
STEPS = (((0, 19), (1, 7)), ((0, 1), (1, 9)), ((0, 1), (1, 1)))


def random_weights(generator: torch.Generator, device: str) -> ModelWeights[Tensor]:
    return weight_plan(CONFIG).map(lambda param: (torch.randn(param.shape, generator=generator) * 0.2).to(device))


def logits_of_steps(ops: Ops, weights: ModelWeights[Tensor], device: str) -> list[Tensor]:
    """The model's logits of each step's every token, over a pool of its own."""
    model = Transformer(CONFIG, weights, ops)
    pool = torch.full((9, CONFIG.num_layers, 2, CONFIG.num_kv_heads, BLOCK_SIZE, CONFIG.head_dim), torch.nan, device=device)
    tables = torch.tensor([[5, 2, 0], [7, 3, 0]], dtype=torch.int32)
    contexts = [0, 0]
    logits = []
    for step in STEPS:
        positions = [torch.arange(contexts[i], contexts[i] + count) for i, count in step]
        slots = [tables[i, at // BLOCK_SIZE].long() * BLOCK_SIZE + at % BLOCK_SIZE for (i, _), at in zip(step, positions, strict=True)]
        for i, count in step:
            contexts[i] += count
        batch = ForwardBatch(
            token_ids=((torch.cat(positions) * 31 + 7) % CONFIG.vocab_size).to(device),
            positions=torch.cat(positions).to(device),
            slots=torch.cat(slots).to(device),
            query_starts=torch.tensor([0] + [count for _, count in step], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device),
            context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
            block_tables=tables.to(device),
            logit_rows=torch.arange(sum(count for _, count in step), device=device),
        )
        logits.append(model.forward(batch, pool))
    return logits
