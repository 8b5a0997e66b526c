"""Computes a StepPlan: packs it into one ForwardBatch, runs the model over the paged pool, samples.

Sampling belongs to the step: logits never leave the runner.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch

from ..kvtransfer.transport import KVPool
from ..models.batch import ForwardBatch
from ..models.transformer import Transformer
from .sampler import Sampled, SamplingRow, sample, score
from .scheduler import Chunk, StepPlan


@dataclass(frozen=True)
class ChunkOutput:
    sampled: Sampled | None                # the token after the chunk, if the chunk ends with the last known one and its logits are finite
    prompt: tuple[Sampled, ...] = ()       # scores of tokens start + 1, … inside the prompt, if the request wants them
    is_finite: bool = True                 # False: NaN or infinity among the logits that were to be sampled or scored


class ModelRunner(Protocol):
    def execute(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> list[ChunkOutput]:
        """One output per chunk. `on_layer(i)` is called once layer i's KV of this step is in the pool."""
        ...


class TorchRunner:
    def __init__(self, model: Transformer, pool: KVPool, device: torch.device) -> None:
        self._model = model
        self._pool = pool
        self._device = device

    @torch.inference_mode()
    def execute(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> list[ChunkOutput]:
        spans = [_logit_span(chunk) for chunk in plan.chunks]
        batch = self._batch(plan.chunks, spans)
        logits = self._model.forward(batch, self._pool.tensor, on_layer)
        return _outputs(plan.chunks, logits, [0, *accumulate(len(span) for span in spans)])

    def _batch(self, chunks: Sequence[Chunk], spans: Sequence[range]) -> ForwardBatch:
        block_size = self._pool.layout.block_size
        starts = [0, *accumulate(chunk.count for chunk in chunks)]
        positions = [p for chunk in chunks for p in range(chunk.start, chunk.end)]
        widest = max(len(chunk.sequence.blocks) for chunk in chunks)
        return ForwardBatch(
            token_ids=self._ints([t for chunk in chunks for t in chunk.sequence.token_ids[chunk.start : chunk.end]]),
            positions=self._ints(positions),
            slots=self._ints([_slot(chunk, p, block_size) for chunk in chunks for p in range(chunk.start, chunk.end)]),
            query_starts=self._ints(starts, torch.int32),
            context_lens=self._ints([chunk.end for chunk in chunks], torch.int32),
            block_tables=self._ints([c.sequence.blocks + [0] * (widest - len(c.sequence.blocks)) for c in chunks], torch.int32),
            logit_rows=self._ints([row for args in zip(chunks, spans, starts[:-1], strict=True) for row in _rows(*args)]),
        )

    def _ints(self, values: object, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)


def _outputs(chunks: Sequence[Chunk], logits: torch.Tensor, bounds: Sequence[int]) -> list[ChunkOutput]:
    """Chunk i has rows bounds[i] to bounds[i + 1] of the logits [R, vocab]."""
    finite = [bool(torch.isfinite(logits[bounds[i] : bounds[i + 1]]).all()) for i in range(len(chunks))]
    sampling = [i for i, chunk in enumerate(chunks) if chunk.samples and finite[i]]
    last_rows = logits[[bounds[i + 1] - 1 for i in sampling]]
    drawn = dict(zip(sampling, sample(last_rows, [_row(chunks[i]) for i in sampling]), strict=True))
    scores = [_prompt_scores(chunk, logits[bounds[i] : bounds[i + 1]]) for i, chunk in enumerate(chunks)]
    return [ChunkOutput(drawn.get(i), scores[i], finite[i]) for i in range(len(chunks))]


def _slot(chunk: Chunk, position: int, block_size: int) -> int:
    return chunk.sequence.blocks[position // block_size] * block_size + position % block_size


def _logit_span(chunk: Chunk) -> range:
    """The positions whose logits are needed."""
    if _wants_prompt_logprobs(chunk):
        return range(chunk.start, chunk.end)
    return range(chunk.end - 1, chunk.end) if chunk.samples else range(0)


def _rows(chunk: Chunk, span: range, first_row: int) -> range:
    return range(first_row + span.start - chunk.start, first_row + span.stop - chunk.start) if span else range(0)


def _wants_prompt_logprobs(chunk: Chunk) -> bool:
    request = chunk.sequence.request
    return request.sampling.prompt_logprobs is not None and chunk.start < request.num_prompt_tokens


def _prompt_scores(chunk: Chunk, logits: torch.Tensor) -> tuple[Sampled, ...]:
    if not _wants_prompt_logprobs(chunk):
        return ()
    request = chunk.sequence.request
    following = request.token_ids[chunk.start + 1 : min(chunk.end + 1, request.num_prompt_tokens)]
    num_top = request.sampling.prompt_logprobs or 0
    return tuple(score(logits[: len(following)], following, [num_top] * len(following)))


def _row(chunk: Chunk) -> SamplingRow:
    sequence = chunk.sequence
    num_prompt = sequence.request.num_prompt_tokens
    return SamplingRow(sequence.request.sampling, sequence.token_ids[:num_prompt], sequence.token_ids[num_prompt:])
