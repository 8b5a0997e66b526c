"""Steps with prompts as CUDA graphs: one upload and a few launches, where the layers one by one take the host eleven launches each.

    pack (host) ──copy──► inputs ──► [ layers 0 … g-1 ] [ g … 2g-1 ] … [ head ─► sample ] ──► sampled
                                            └─ on_layer ──┘

A shape of prompts alone (`prompt_steps.py`) is cut into a graph for each group of layers, so that their pages can leave between.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.decode_inputs import fetch_pending
from ..kernels.sampling import Draws, sample
from ..kvtransfer.transport import KVPool
from ..models.batch import ForwardBatch
from ..models.transformer import Transformer
from .engine import EngineLimits
from .graph_choice import replay_s
from .graph_results import begin_capture, standing
from .prompt_steps import PromptStep, StepInputs, StepShape, fast_shapes, fill, inputs_within, padded_rows, shape_for, step_shapes
from .staging import Staging


@dataclass(frozen=True)
class _Captured:
    pieces: list[torch.cuda.CUDAGraph]
    layers: list[int]                    # after which each piece but the last ends
    inputs: list[StepInputs[NDArray[Any]]]      # one for each buffer of the staging
    num_bytes: int
    logits: Tensor                       # [sequences, vocab], until the next replay
    seconds: float                       # that a step of padding takes


class PromptGraphs:
    """`sampled` [max_sequences] int64: the tokens of the step before; -1 where logits were not finite. If not `samples`, it is another
    rank's, which writes it."""

    def __init__(
        self, model: Transformer, pool: KVPool, sampled: Tensor, limits: EngineLimits, layer_group: int, samples: bool = True
    ) -> None:
        self._model, self._pool, self._sampled, self._samples = model, pool, sampled, samples
        self._layer_group = layer_group
        self._max_blocks = -(-limits.max_model_len // limits.block_size)
        self.shapes = step_shapes(limits.max_step_tokens, limits.max_sequences)
        endless = torch.empty(1 << 50, dtype=torch.uint8, device="meta")
        num_bytes = max(inputs_within(endless, shape, self._max_blocks)[1] for shape in self.shapes)
        device = pool.tensor.device
        self._staging = Staging(num_bytes, device)
        self._buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._captured: dict[StepShape, _Captured] = {}

    @torch.inference_mode()
    def capture(self, agree: Callable[[list[StepShape]], list[StepShape]]) -> None:
        """All shapes, the largest first: the others fit into its memory. What larger ones outrun is dropped again; `agree` gives the choice
        that all ranks keep to."""
        memory = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()                        # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for shape in reversed(self.shapes):
                self._captured[shape] = self._capture(shape, memory)
        torch.cuda.current_stream().wait_stream(stream)
        self.shapes = agree(fast_shapes({shape: self._captured[shape].seconds for shape in self.shapes}))
        self._captured = {shape: self._captured[shape] for shape in self.shapes}

    @property
    def padded_rows(self) -> list[int]:
        """Of steps with single rows, ascending, whatever the number of sequences."""
        return padded_rows(self.shapes)

    def shape_of(self, step: PromptStep) -> StepShape | None:
        return shape_for(self.shapes, len(step.packed.token_ids), len(step.packed.context_lens), step.has_single_rows)

    def replay(self, shape: StepShape, step: PromptStep, on_layer: Callable[[int], None] | None) -> Tensor:
        """Queues the step; its R tokens are then the first in `sampled` → logits, of which the first R rows are theirs."""
        captured = self._captured[shape]
        host = self._staging.next()
        fill(captured.inputs[self._staging.turn], step)
        self._buffer[: captured.num_bytes].copy_(host[: captured.num_bytes], non_blocking=True)
        *pieces, last = captured.pieces
        for piece, layer in zip(pieces, captured.layers, strict=True):
            piece.replay()
            if on_layer is not None:
                on_layer(layer)
        last.replay()
        if on_layer is not None and not captured.layers:
            on_layer(self._pool.layout.num_layers - 1)
        return captured.logits

    def _capture(self, shape: StepShape, memory: Any) -> _Captured:
        inputs, num_bytes = inputs_within(self._buffer, shape, self._max_blocks)
        self._buffer.zero_()
        inputs.slots.fill_(-1)
        inputs.share_tokens.fill_(1)
        self._step(inputs, shape, None)                     # compiles, and lets cuBLAS choose
        torch.cuda.current_stream().synchronize()
        last = self._pool.layout.num_layers - 1
        pieces, layers = [torch.cuda.CUDAGraph()], list[int]()

        def cut(layer: int) -> None:
            if not shape.has_single_rows and ((layer + 1) % self._layer_group == 0 or layer == last):
                pieces[-1].capture_end()
                layers.append(layer)
                pieces.append(torch.cuda.CUDAGraph())
                begin_capture(pieces[-1], memory)

        begin_capture(pieces[-1], memory)
        logits = standing(self._step(inputs, shape, cut))
        pieces[-1].capture_end()
        hosts = [_arrays(inputs_within(buffer, shape, self._max_blocks)[0]) for buffer in self._staging.buffers]
        return _Captured(pieces, layers, hosts, num_bytes, logits, replay_s(pieces))

    def _step(self, inputs: StepInputs[Tensor], shape: StepShape, on_layer: Callable[[int], None] | None) -> Tensor:
        if shape.has_single_rows:
            fetch_pending(inputs.token_ids, inputs.pending_rows, inputs.sources, self._sampled)
        batch = ForwardBatch(
            token_ids=inputs.token_ids[: shape.tokens],
            positions=inputs.positions,
            slots=inputs.slots,
            query_starts=inputs.query_starts,
            context_lens=inputs.context_lens,
            block_tables=inputs.block_tables,
            logit_rows=inputs.logit_rows,
            has_single_rows=shape.has_single_rows,
            share_tokens=inputs.share_tokens,
        )
        logits = self._model.forward(batch, self._pool.tensor, on_layer)
        if self._samples:
            temperature, top_p, min_p, fraction = inputs.real
            draws = Draws(temperature, inputs.top_k, top_p, min_p, fraction)
            sample(logits, draws, refuse_infinite=True, out=self._sampled[: shape.sequences])
        return logits


def _arrays(inputs: StepInputs[Tensor]) -> StepInputs[NDArray[Any]]:
    return StepInputs(**{name: tensor.numpy() for name, tensor in vars(inputs).items()})
