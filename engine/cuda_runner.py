"""The runner of a GPU: queues a step and returns; the tokens stay on the device for the next one.

    launch(plan) ─┬─ decodes alone ─► one upload, one CUDA graph (decode_graphs.py) ─────┐
                  ├─ any prompt ────► one upload, some CUDA graphs (prompt_graphs.py) ────┼─► sampled ──► pinned host memory, event
                  └─ what these do not take ─► one upload, kernel by kernel ──────────────┘      ▲
                                                          logits ──► device_sampler.py ──────────┘ for rows that want more than a draw
    launch(next plan) … its PENDING tokens are read from `sampled` by row
    outputs.wait() ◄── event

Of several ranks the first one samples; the others read its tokens from its memory, once its last step is over.

Nothing between launch and wait needs the host. A draw is in fp32 here and in fp64 in `sampler.py`, from the same uniform number: they can
part where two tokens' cumulative weights are that close.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.context_shares import share_tokens
from ..kernels.decode_inputs import fetch_pending
from ..kernels.sampling import Draws, sample
from ..kvtransfer.transport import KVPool
from ..messages.errors import PoolTooSmall
from ..models.batch import ForwardBatch
from ..models.transformer import Transformer
from .decode_graphs import DecodeGraphs
from .decode_rows import DecodeRow
from .device_sampler import DeviceSampler, Scores
from .draw import DRAWN_AGAIN, Draw, columns, draw_of
from .engine import EngineLimits
from .model_runner import ChunkOutput, Computed, StepOutputs, logit_span
from .packing import pack
from .prompt_graphs import PromptGraphs
from .prompt_steps import PromptStep, StepShape
from .row_extras import CountSlots, changed_rows, counted, scored_rows
from .sampler import Sampled
from .scheduler import Chunk, StepPlan
from .sequence import Sequence as Seq
from .staging import DEPTH, Staging


@dataclass(frozen=True)
class Queued:
    """A step's outputs, once `event` has passed."""

    event: Any                     # torch.cuda.Event, whose methods have no types
    tokens: Tensor                 # [R] int64, pinned: of the chunks that sample, in order; -1: logits not finite
    samples: tuple[bool, ...]      # of each chunk
    scores: Scores | None          # None: nobody asked for log-probabilities

    def is_ready(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> list[ChunkOutput]:
        self.event.synchronize()
        tokens = self.tokens.tolist()
        drawn = iter(tokens)
        if self.scores is None:
            return [_output(next(drawn)) if samples else ChunkOutput(None) for samples in self.samples]
        return [
            _scored(next(drawn) if samples else None, prompt, sampled)
            for samples, (prompt, sampled) in zip(self.samples, self.scores.of_chunks(tokens), strict=True)
        ]


class SampledTokens:
    """Of a worker's steps: written by the rank that samples, read by all at the beginning of the next step."""

    def __init__(self, max_sequences: int, device: torch.device) -> None:
        self.tokens = torch.zeros(max_sequences, dtype=torch.int64, device=device)
        self._written: list[Any] = [None, None]              # torch.cuda.Event, of even steps and of odd ones

    def wrote(self, step: int) -> Any:
        """→ the event of all that the current stream has been given so far."""
        self._written[step % 2] = event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def wait_for(self, step: int) -> None:
        """On the current stream, of another GPU."""
        if (event := self._written[step % 2]) is not None:
            torch.cuda.current_stream().wait_event(event)


@dataclass(frozen=True)
class Seat:
    """Of a runner among the ranks of its worker."""

    sampled: SampledTokens
    samples: bool = True                                      # False: a rank that only computes its part of the layers
    agree: Callable[[list[StepShape]], list[StepShape]] = lambda shapes: shapes


class CudaRunner:
    """Raises PoolTooSmall: its CUDA graphs do not fit into what the KV pool leaves."""

    runs_ahead = True

    def __init__(
        self, model: Transformer, pool: KVPool, limits: EngineLimits, device: torch.device, layer_group: int, seat: Seat | None = None
    ) -> None:
        seat = seat or Seat(SampledTokens(limits.max_sequences, device))
        self._model, self.pool, self._device, self._seat = model, pool, device, seat
        self._num_steps = 0
        self._num_layers = pool.layout.num_layers
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._sampled = sampled = seat.sampled.tokens
        self._row_of: dict[Seq, int] = {}            # in `sampled`, of the step that was launched last
        self._staging = Staging(64 * (limits.max_step_tokens + limits.max_sequences), device)
        self._tokens = [torch.zeros(limits.max_sequences, dtype=torch.int64, pin_memory=True) for _ in range(DEPTH)]
        self._turn = 0
        self._slots = CountSlots(limits.max_sequences)
        self._graphs = DecodeGraphs(model, pool, sampled, limits.max_sequences, limits.max_model_len, seat.samples)
        self._prompt_graphs = PromptGraphs(model, pool, sampled, limits, layer_group, seat.samples)
        try:
            if seat.samples:
                self._sampler = DeviceSampler(sampled, model.config.vocab_size, limits.max_model_len)
            with torch.cuda.device(device):
                self._graphs.capture()
                self._prompt_graphs.capture(seat.agree)
        except torch.OutOfMemoryError as error:
            raise PoolTooSmall(f"no room for CUDA graphs beside weights and KV; give gpu_memory a smaller share: {error}") from None

    @property
    def padded_rows(self) -> Sequence[int]:
        return self._prompt_graphs.padded_rows

    @torch.inference_mode()
    def launch(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> StepOutputs:
        chunks = plan.chunks
        self._num_steps += 1
        if not self._seat.samples:
            self._seat.sampled.wait_for(self._num_steps - 1)
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        changed, fresh = changed_rows(sampling, self._slots)
        again = frozenset(() if changed is None else changed.sequences)
        draws = [DRAWN_AGAIN if sequence in again else draw_of(sequence) for sequence in sampling]
        if len(sampling) == len(chunks) <= self._graphs.max_batch and all(chunk.count == 1 for chunk in chunks):
            logits = drawn_from = self._decode(chunks, draws, on_layer)
        else:
            logits, drawn_from = self._prefill(chunks, draws, on_layer)
        self._row_of = {sequence: row for row, sequence in enumerate(sampling)}
        if not self._seat.samples:
            return Computed([])
        if fresh:
            self._sampler.count(counted(fresh, self._model.config.vocab_size))
        if changed is not None:
            self._sampler.draw_changed(drawn_from, changed)
        scored = scored_rows(chunks, self._model.config.vocab_size)
        scores = None if scored is None else self._sampler.score(logits, scored)
        return self._queue(chunks, len(sampling), scores)

    @torch.inference_mode()
    def rouse(self) -> None:
        """What a step copies, both ways, and nothing between."""
        self._graphs.rouse()
        if self._seat.samples:
            self._queue((), 1, None).is_ready()

    def replay_last(self, num_sequences: int) -> None:
        """Queues the graph of that batch once more, on what it was last given: for a benchmark."""
        self._graphs.replay_last(num_sequences)

    def _decode(self, chunks: Sequence[Chunk], draws: Sequence[Draw], on_layer: Callable[[int], None] | None) -> Tensor:
        logits = self._graphs.replay([self._decode_row(chunk, draw) for chunk, draw in zip(chunks, draws, strict=True)])
        if on_layer is not None:
            on_layer(self._num_layers - 1)
        return logits

    def _decode_row(self, chunk: Chunk, draw: Draw) -> DecodeRow:
        sequence = chunk.sequence
        source = self._row_of[sequence] if sequence.is_pending else -1
        return DecodeRow(chunk.end, source, max(0, sequence.token_ids[chunk.start]), sequence.blocks, draw)

    def _prefill(
        self, chunks: Sequence[Chunk], draws: Sequence[Draw], on_layer: Callable[[int], None] | None
    ) -> tuple[Tensor, Tensor]:
        """→ logits of all `logit_span`s [N, vocab], and of the rows that were sampled [R, vocab]."""
        spans = [logit_span(chunk) for chunk in chunks]
        step = self._prompt_step(chunks, spans, draws)
        has_scored = any(len(span) != chunk.samples for chunk, span in zip(chunks, spans, strict=True))
        if not has_scored and (shape := self._prompt_graphs.shape_of(step)) is not None:
            logits = self._prompt_graphs.replay(shape, step, on_layer)
            return logits, logits
        lasts = [end - 1 for end, chunk in zip(accumulate(map(len, spans)), chunks, strict=True) if chunk.samples]
        return self._kernel_by_kernel(step, np.array(lasts, dtype=np.int64), on_layer)

    def _prompt_step(self, chunks: Sequence[Chunk], spans: Sequence[range], draws: Sequence[Draw]) -> PromptStep:
        packed = pack(chunks, spans, self.pool.layout.block_size)
        pending = [i for i, chunk in enumerate(chunks) if chunk.samples and chunk.sequence.is_pending]
        rows = packed.query_starts[1:][pending].astype(np.int64) - 1          # a pending token is its chunk's last
        sources = np.array([self._row_of[chunks[i].sequence] for i in pending], dtype=np.int64)
        share = share_tokens([chunk.end for chunk in chunks if chunk.count == 1], self.pool.layout.rank_heads, self._num_sms)
        return PromptStep(packed, rows, sources, *columns(draws), share)

    def _kernel_by_kernel(
        self, step: PromptStep, sampled_rows: NDArray[np.int64], on_layer: Callable[[int], None] | None
    ) -> tuple[Tensor, Tensor]:
        packed = step.packed
        arrays = [packed.token_ids, packed.positions, packed.slots, packed.query_starts, packed.context_lens, packed.block_tables]
        share = np.array([step.share_tokens], dtype=np.int32)
        uploaded = self._staging.upload(
            [*arrays, packed.logit_rows, step.pending_rows, step.sources, step.aligned_real, step.top_k, share, sampled_rows]
        )
        pending_rows, sources, real, top_k, share_on_device, sampled_there = uploaded[7:]
        token_ids, positions, slots, starts, contexts, tables, logit_rows = uploaded[:7]
        shape = step.has_single_rows, step.is_whole_prompt
        batch = ForwardBatch(token_ids, positions, slots, starts, contexts, tables, logit_rows, *shape, share_on_device)
        fetch_pending(batch.token_ids, pending_rows, sources, self._sampled)
        logits = self._model.forward(batch, self.pool.tensor, on_layer)
        drawn_from = logits if len(sampled_rows) == len(logits) else logits[sampled_there]
        if len(drawn_from) and self._seat.samples:
            temperature, top_p, min_p, fraction = real
            draws = Draws(temperature, top_k, top_p, min_p, fraction)
            sample(drawn_from, draws, refuse_infinite=True, out=self._sampled[: len(drawn_from)])
        return logits, drawn_from

    def _queue(self, chunks: Sequence[Chunk], num_sampled: int, scores: Scores | None) -> Queued:
        self._turn = (self._turn + 1) % DEPTH
        tokens = self._tokens[self._turn][:num_sampled]
        tokens.copy_(self._sampled[:num_sampled], non_blocking=True)
        event = self._seat.sampled.wrote(self._num_steps)
        return Queued(event, tokens, tuple(chunk.samples for chunk in chunks), scores)


def _output(token: int) -> ChunkOutput:
    return ChunkOutput(None, is_finite=False) if token < 0 else ChunkOutput(Sampled(token))


def _scored(token: int | None, prompt: tuple[Sampled, ...], sampled: Sampled | None) -> ChunkOutput:
    if token == -1 or any(math.isnan(each.logprob) for each in prompt if each.logprob is not None):
        return ChunkOutput(None, is_finite=False)
    return ChunkOutput(sampled or (None if token is None else Sampled(token)), prompt)
