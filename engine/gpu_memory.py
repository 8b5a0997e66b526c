"""How much of a GPU is left for KV: the model is run once at its largest step, and what that took is known from then on.

    room = share · total − (weights, the largest step's activations, whatever else is on the GPU) − what sampling takes beside them

What torch has reserved by then it keeps, so nothing that a step needs later competes with the pool.
"""

import math
from itertools import pairwise

import torch

from ..kvtransfer.layout import KVLayout
from ..messages.errors import ModelError, PoolTooSmall
from ..models.batch import ForwardBatch
from ..models.transformer import Transformer
from ..models.weights import ModelWeights, Param
from .config import EngineConfig
from .scheduler import MAX_SCORED_TOKENS


def require_room_for_weights(plan: ModelWeights[Param], dtype: torch.dtype, device: torch.device) -> None:
    """Raises ModelError with the numbers, before anything is loaded."""
    num_bytes = sum(math.prod(param.shape) for param in plan.leaves()) * dtype.itemsize
    free, total = torch.cuda.mem_get_info(device)
    if num_bytes > free:
        sizes = f"{num_bytes / 2**30:.1f} GiB; of the GPU's {total / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
        raise ModelError(f"the weights take {sizes}")


def kv_room(model: Transformer, dtype: torch.dtype, layout: KVLayout, engine: EngineConfig, device: torch.device) -> int:
    """Bytes; `dtype` is the model's. Raises PoolTooSmall with the numbers if nothing is left."""
    _largest_step(model, layout, engine, device)
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    taken_bytes = total - free + sampling_bytes(model.config.vocab_size, dtype, engine)
    room = int(engine.gpu_memory * total) - taken_bytes
    if room <= 0:
        taken = f"{taken_bytes / 2**30:.1f} GiB are taken by weights, the largest step, sampling and other processes"
        raise PoolTooSmall(f"no room for KV: {taken}, {engine.gpu_memory:.0%} of {total / 2**30:.1f} GiB may be")
    return room


def sampling_bytes(vocab: int, dtype: torch.dtype, engine: EngineConfig) -> int:
    """Counts of tokens, and logits of rows that are changed and of prompts that are scored, as many as there can be in a step."""
    changed = engine.max_sequences * (torch.int16.itemsize + torch.float32.itemsize + dtype.itemsize)
    return vocab * (changed + min(MAX_SCORED_TOKENS, engine.max_step_tokens) * dtype.itemsize)


def _largest_step(model: Transformer, layout: KVLayout, engine: EngineConfig, device: torch.device) -> None:
    """As many prompts as may end in one step, of all the tokens that it may have: nothing is stored, all read one block of zeros."""
    num_tokens, num_prompts = engine.max_step_tokens, min(engine.max_sequences, engine.max_step_tokens)
    starts = [num_tokens * i // num_prompts for i in range(num_prompts + 1)]
    longest = max(b - a for a, b in pairwise(starts))
    pool = torch.zeros(layout.shape(1), dtype=layout.dtype, device=device)
    batch = ForwardBatch(
        token_ids=torch.zeros(num_tokens, dtype=torch.int64, device=device),
        positions=torch.zeros(num_tokens, dtype=torch.int64, device=device),
        slots=torch.full((num_tokens,), -1, dtype=torch.int64, device=device),
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens=torch.tensor([b - a for a, b in pairwise(starts)], dtype=torch.int32, device=device),
        block_tables=torch.zeros(num_prompts, -(-longest // layout.block_size), dtype=torch.int32, device=device),
        logit_rows=torch.tensor(starts[1:], device=device) - 1,
    )
    model.forward(batch, pool)
