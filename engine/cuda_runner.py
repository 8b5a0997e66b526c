"""The runner of a GPU: queues a step and returns; the tokens stay on the device for the next one.

    launch(plan) ─┬─ decodes alone ─► one upload, one CUDA graph (decode_graphs.py) ─────┐
                  ├─ any prompt ────► one upload, some CUDA graphs (prompt_graphs.py) ────┼─► sampled ──► pinned host memory, event
                  └─ what these do not take ─► one upload, kernel by kernel ──────────────┘
    launch(next plan) … its PENDING tokens are read from `sampled` by row
    outputs.wait() ◄── event

Nothing between launch and wait needs the host. The exception are requests whose sampling or scores the device has no kernel for
(penalties, biases, log-probabilities): their steps are sampled by `sampler.py`, and the engine plans no step ahead of their tokens.
A draw is in fp32 here and in fp64 there, from the same uniform number: they can part where two tokens' cumulative weights are that close.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.context_shares import share_tokens
from ..kernels.sampling import Draws, sample
from ..kvtransfer.transport import KVPool
from ..messages.errors import PoolTooSmall
from ..models.batch import ForwardBatch
from ..models.transformer import Transformer
from .decode_graphs import DecodeGraphs, DecodeRow
from .engine import EngineLimits
from .model_runner import ChunkOutput, Computed, StepOutputs, logit_span, outputs_of
from .packing import pack
from .prompt_graphs import PromptGraphs
from .prompt_steps import PromptStep
from .sampler import Sampled, uniform
from .scheduler import Chunk, StepPlan
from .sequence import Sequence as Seq
from .staging import DEPTH, Staging


@dataclass(frozen=True)
class Queued:
    """A step's outputs, once `event` has passed."""

    event: Any                     # torch.cuda.Event, whose methods have no types
    tokens: Tensor                 # [R] int64, pinned: of the chunks that sample, in order; -1: logits not finite
    samples: tuple[bool, ...]      # of each chunk

    def is_ready(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> list[ChunkOutput]:
        self.event.synchronize()
        tokens = iter(self.tokens.tolist())
        return [_output(next(tokens)) if samples else ChunkOutput(None) for samples in self.samples]


class CudaRunner:
    """Raises PoolTooSmall: its CUDA graphs do not fit into what the KV pool leaves."""

    runs_ahead = True

    def __init__(self, model: Transformer, pool: KVPool, limits: EngineLimits, device: torch.device, layer_group: int) -> None:
        self._model, self.pool, self._device = model, pool, device
        self._num_layers = pool.layout.num_layers
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._sampled = torch.zeros(limits.max_sequences, dtype=torch.int64, device=device)
        self._row_of: dict[Seq, int] = {}            # in `sampled`, of the step that was launched last
        self._staging = Staging(64 * (limits.max_step_tokens + limits.max_sequences), device)
        self._tokens = [torch.zeros(limits.max_sequences, dtype=torch.int64, pin_memory=True) for _ in range(DEPTH)]
        self._turn = 0
        self._graphs = DecodeGraphs(model, pool, self._sampled, limits.max_sequences, limits.max_model_len)
        self._prompt_graphs = PromptGraphs(model, pool, self._sampled, limits, layer_group)
        try:
            with torch.cuda.device(device):
                self._graphs.capture()
                self._prompt_graphs.capture()
        except torch.OutOfMemoryError as error:
            raise PoolTooSmall(f"no room for CUDA graphs beside weights and KV; give gpu_memory a smaller share: {error}") from None

    @property
    def padded_rows(self) -> Sequence[int]:
        return self._prompt_graphs.padded_rows

    def needs_tokens(self, sequence: Seq) -> bool:
        sampling = sequence.request.sampling
        return (
            sampling.logprobs is not None
            or sampling.prompt_logprobs is not None
            or bool(sampling.logit_bias)
            or sampling.repetition_penalty != 1
            or sampling.presence_penalty != 0
            or sampling.frequency_penalty != 0
            or (bool(sampling.stop_token_ids) and sequence.num_outputs < sampling.min_tokens)
        )

    @torch.inference_mode()
    def launch(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> StepOutputs:
        chunks, on_host = plan.chunks, any(self.needs_tokens(chunk.sequence) for chunk in plan.chunks)
        logits: Tensor | None
        if all(chunk.count == 1 and chunk.samples for chunk in chunks) and len(chunks) <= self._graphs.max_batch:
            logits, bounds = self._decode(chunks, on_layer)
        else:
            logits, bounds = self._prefill(chunks, on_layer, sampled_here=not on_host)
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        self._row_of = {sequence: row for row, sequence in enumerate(sampling)}
        return self._on_host(chunks, logits, bounds) if logits is not None and on_host else self._queue(chunks, len(sampling))

    def replay_last(self, num_sequences: int) -> None:
        """Queues the graph of that batch once more, on what it was last given: for a benchmark."""
        self._graphs.replay_last(num_sequences)

    def _decode(self, chunks: Sequence[Chunk], on_layer: Callable[[int], None] | None) -> tuple[Tensor, Sequence[int]]:
        logits = self._graphs.replay([self._decode_row(chunk) for chunk in chunks])
        if on_layer is not None:
            for layer in range(self._num_layers):
                on_layer(layer)
        return logits, range(len(chunks) + 1)

    def _decode_row(self, chunk: Chunk) -> DecodeRow:
        sequence, sampling = chunk.sequence, chunk.sequence.request.sampling
        source = self._row_of[sequence] if sequence.is_pending else -1
        return DecodeRow(
            context=chunk.end,
            source=source,
            token=max(0, sequence.token_ids[chunk.start]),
            blocks=sequence.blocks,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            fraction=uniform(sampling.seed, sequence.num_outputs) if sampling.temperature > 0 else 0.0,
        )

    def _prefill(
        self, chunks: Sequence[Chunk], on_layer: Callable[[int], None] | None, sampled_here: bool
    ) -> tuple[Tensor | None, Sequence[int]]:
        """→ logits [R, vocab], and where each chunk's begin in them; None: they were sampled."""
        spans = [logit_span(chunk) for chunk in chunks]
        step = self._prompt_step(chunks, spans)
        if sampled_here and (shape := self._prompt_graphs.shape_of(step)) is not None:
            self._prompt_graphs.replay(shape, step, on_layer)
            return None, ()
        return self._kernel_by_kernel(step, on_layer, sampled_here), [0, *accumulate(len(span) for span in spans)]

    def _prompt_step(self, chunks: Sequence[Chunk], spans: Sequence[range]) -> PromptStep:
        packed = pack(chunks, spans, self.pool.layout.block_size)
        pending = [i for i, chunk in enumerate(chunks) if chunk.samples and chunk.sequence.is_pending]
        rows = packed.query_starts[1:][pending].astype(np.int64) - 1          # a pending token is its chunk's last
        sources = np.array([self._row_of[chunks[i].sequence] for i in pending], dtype=np.int64)
        share = share_tokens([chunk.end for chunk in chunks if chunk.count == 1], self.pool.layout.num_kv_heads, self._num_sms)
        return PromptStep(packed, rows, sources, *_draws([chunk for chunk in chunks if chunk.samples]), share)

    def _kernel_by_kernel(self, step: PromptStep, on_layer: Callable[[int], None] | None, sampled_here: bool) -> Tensor:
        packed = step.packed
        arrays = [packed.token_ids, packed.positions, packed.slots, packed.query_starts, packed.context_lens, packed.block_tables]
        share = np.array([step.share_tokens], dtype=np.int32)
        uploaded = self._staging.upload([*arrays, packed.logit_rows, step.pending_rows, step.sources, step.aligned_real, step.top_k, share])
        pending_rows, sources, real, top_k, share_on_device = uploaded[7:]
        token_ids, positions, slots, starts, contexts, tables, logit_rows = uploaded[:7]
        shape = step.has_single_rows, step.is_whole_prompt
        batch = ForwardBatch(token_ids, positions, slots, starts, contexts, tables, logit_rows, *shape, share_on_device)
        if len(sources):
            batch.token_ids[pending_rows] = self._sampled[sources].clamp_min(0)
        logits = self._model.forward(batch, self.pool.tensor, on_layer)
        if sampled_here and len(logits):
            temperature, top_p, min_p, fraction = real
            draws = Draws(temperature, top_k, top_p, min_p, fraction)
            sample(logits, draws, refuse_infinite=True, out=self._sampled[: len(logits)])
        return logits

    def _on_host(self, chunks: Sequence[Chunk], logits: Tensor, bounds: Sequence[int]) -> Computed:
        outputs = outputs_of(chunks, logits, bounds)
        tokens = [output.sampled.token_id if output.sampled else -1 for output, c in zip(outputs, chunks, strict=True) if c.samples]
        self._sampled[: len(tokens)] = torch.tensor(tokens, device=self._device)
        return Computed(outputs)

    def _queue(self, chunks: Sequence[Chunk], num_sampled: int) -> Queued:
        self._turn = (self._turn + 1) % DEPTH
        tokens = self._tokens[self._turn][:num_sampled]
        tokens.copy_(self._sampled[:num_sampled], non_blocking=True)
        event: Any = torch.cuda.Event()             # type: ignore[no-untyped-call]
        event.record()
        return Queued(event, tokens, tuple(chunk.samples for chunk in chunks))


def _draws(chunks: Sequence[Chunk]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """What `Draws` needs: [4, R] fp32 of temperature, top_p, min_p and fraction; [R] int32 of top_k."""
    params = [chunk.sequence.request.sampling for chunk in chunks]
    fractions = [uniform(p.seed, chunk.sequence.num_outputs) for p, chunk in zip(params, chunks, strict=True)]
    columns = [p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params], fractions
    return np.array(columns, dtype=np.float32), np.array([p.top_k for p in params], dtype=np.int32)


def _output(token: int) -> ChunkOutput:
    return ChunkOutput(None, is_finite=False) if token < 0 else ChunkOutput(Sampled(token))
