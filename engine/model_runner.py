"""Computes a StepPlan: packs it into one ForwardBatch, runs the model over the paged pool, samples.

    launch(plan) ──► StepOutputs ──► is_ready? ──► wait(): one ChunkOutput a chunk

Sampling belongs to the step: logits never leave the runner. `TorchRunner` has computed everything when `launch` returns;
`cuda_runner.py` has queued it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from msgspec import Struct

from ..kvtransfer.transport import KVPool
from ..models.batch import ForwardBatch
from ..models.transformer import Transformer
from .packing import Ints, pack
from .sampler import Sampled, SamplingRow, sample, score
from .scheduler import Chunk, StepPlan


class ChunkOutput(Struct, frozen=True):
    sampled: Sampled | None                # the token after the chunk, if the chunk ends with the last known one and its logits are finite
    prompt: tuple[Sampled, ...] = ()       # scores of tokens start + 1, … inside the prompt, if the request wants them
    is_finite: bool = True                 # False: NaN or infinity among the logits that were to be sampled or scored


class StepOutputs(Protocol):
    def is_ready(self) -> bool: ...

    def wait(self) -> list[ChunkOutput]:
        """One output per chunk of the plan."""
        ...


class ModelRunner(Protocol):
    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be launched while the one before it is under way, some of its tokens PENDING."""
        ...

    @property
    def padded_rows(self) -> Seq[int]:
        """Ascending: the rows that steps with prompts beside decodes are padded to. None beyond the last, or at all."""
        ...

    def launch(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> StepOutputs:
        """`on_layer(i)` is called once the KV of this step up to layer i is in the pool (on a GPU: queued to be, before what is queued on
        the current stream from then on): for all layers or some of them, in order, and the last."""
        ...

    def rouse(self) -> None:
        """With no step under way and one soon to come: the first calls after a rest take a GPU's driver some 0.2 ms longer."""
        ...


@dataclass(frozen=True)
class Computed:
    outputs: list[ChunkOutput]

    def is_ready(self) -> bool:
        return True

    def wait(self) -> list[ChunkOutput]:
        return self.outputs


class SyncRunner(ABC):
    """A runner whose launch returns when everything has been computed."""

    runs_ahead = False
    padded_rows = ()

    @abstractmethod
    def execute(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> list[ChunkOutput]: ...

    def launch(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> StepOutputs:
        return Computed(self.execute(plan, on_layer))

    def rouse(self) -> None:
        return


class TorchRunner(SyncRunner):
    """`samples`: not so in ranks that only compute their part of the layers."""

    def __init__(self, model: Transformer, pool: KVPool, device: torch.device, samples: bool = True) -> None:
        self._model = model
        self._pool = pool
        self._device = device
        self._samples = samples

    @torch.inference_mode()
    def execute(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> list[ChunkOutput]:
        spans = [logit_span(chunk) for chunk in plan.chunks]
        batch = self._batch(plan.chunks, spans)
        logits = self._model.forward(batch, self._pool.tensor, on_layer)
        if not self._samples:
            return []
        return outputs_of(plan.chunks, logits, [0, *accumulate(len(span) for span in spans)])

    def _batch(self, chunks: Seq[Chunk], spans: Seq[range]) -> ForwardBatch:
        packed = pack(chunks, spans, self._pool.layout.block_size)
        return ForwardBatch(
            token_ids=self._there(packed.token_ids),
            positions=self._there(packed.positions),
            slots=self._there(packed.slots),
            query_starts=self._there(packed.query_starts),
            context_lens=self._there(packed.context_lens),
            block_tables=self._there(packed.block_tables),
            logit_rows=self._there(packed.logit_rows),
        )

    def _there(self, array: Ints) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def outputs_of(chunks: Seq[Chunk], logits: torch.Tensor, bounds: Seq[int]) -> list[ChunkOutput]:
    """Chunk i has rows bounds[i] to bounds[i + 1] of the logits [R, vocab]."""
    finite = [_are_finite(logits[bounds[i] : bounds[i + 1]]) for i in range(len(chunks))]
    sampling = [i for i, chunk in enumerate(chunks) if chunk.samples and finite[i]]
    last_rows = logits[[bounds[i + 1] - 1 for i in sampling]]
    drawn = dict(zip(sampling, sample(last_rows, [_row(chunks[i]) for i in sampling]), strict=True))
    scores = [_prompt_scores(chunk, logits[bounds[i] : bounds[i + 1]]) for i, chunk in enumerate(chunks)]
    return [ChunkOutput(drawn.get(i), scores[i], finite[i]) for i in range(len(chunks))]


def _are_finite(logits: torch.Tensor) -> bool:
    """`isfinite` of them all would take more memory than they do; the extremes are NaN where anything is."""
    return not logits.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(logits))).all())


def logit_span(chunk: Chunk) -> range:
    """The positions whose logits are needed."""
    if _wants_prompt_logprobs(chunk):
        return range(chunk.start, chunk.end)
    return range(chunk.end - 1, chunk.end) if chunk.samples else range(0)


def _wants_prompt_logprobs(chunk: Chunk) -> bool:
    request = chunk.sequence.request
    return request.sampling.prompt_logprobs is not None and chunk.start < request.num_prompt_tokens


def scored_prompt(chunk: Chunk) -> tuple[int, ...]:
    """The tokens of the prompt that follow on the chunk's first ones, if their log-probabilities are asked for."""
    if not _wants_prompt_logprobs(chunk):
        return ()
    request = chunk.sequence.request
    return request.token_ids[chunk.start + 1 : min(chunk.end + 1, request.num_prompt_tokens)]


def _prompt_scores(chunk: Chunk, logits: torch.Tensor) -> tuple[Sampled, ...]:
    following, num_top = scored_prompt(chunk), chunk.sequence.request.sampling.prompt_logprobs or 0
    return tuple(score(logits[: len(following)], following, [num_top] * len(following)))


def _row(chunk: Chunk) -> SamplingRow:
    sequence = chunk.sequence
    num_prompt = sequence.request.num_prompt_tokens
    return SamplingRow(sequence.request.sampling, sequence.token_ids[:num_prompt], sequence.token_ids[num_prompt:])
