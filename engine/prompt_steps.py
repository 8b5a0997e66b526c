"""Which steps with prompts have a CUDA graph, and what its inputs look like: values only, so that a machine without a GPU can test it.

There is a graph for some numbers of tokens and sequences, a `StepShape`; a step takes the smallest that holds it. What that has over is
padding: tokens that are stored nowhere, sequences without rows. Products come in tiles of rows, so little of a step is for nothing.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray
from torch import Tensor

from .graph_choice import not_outrun
from .packing import PackedBatch
from .staging import ALIGNMENT

Array = TypeVar("Array")

MOST_TOKENS = 2048              # a larger step keeps the GPU busy for longer than its launches take
FINE = 64                       # tokens
MOST_PROMPTS = 32               # of a shape without single rows
BESIDE = (16, 64)               # sequences, in shapes with single rows: decodes' contexts are cut by how many there may be


class StepShape(Struct, frozen=True, order=True):
    tokens: int
    has_single_rows: bool       # False: every sequence has several rows
    sequences: int              # fewer than tokens: what has as many is a step of decodes

    def takes(self, tokens: int, sequences: int, single_rows: bool) -> bool:
        return tokens <= self.tokens and sequences <= self.sequences and (self.has_single_rows or not single_rows)


def step_shapes(max_step_tokens: int, max_sequences: int) -> list[StepShape]:
    """In order: prompts alone in steps of 64 tokens; with few and with many single rows beside in steps of 64, from 256 on of 128."""
    largest = min(MOST_TOKENS, -(-max_step_tokens // FINE) * FINE)
    shapes = {StepShape(most, False, min(MOST_PROMPTS, max_sequences, most - 1)) for most in range(FINE, largest + 1, FINE)}
    for most in {*range(FINE, 256, FINE), *range(256, largest, 128), largest}:
        shapes |= {StepShape(most, True, min(count, max_sequences, most - 1)) for count in (*BESIDE, max_sequences) if most <= largest}
    return sorted(shapes)


def shape_for(shapes: Sequence[StepShape], tokens: int, sequences: int, single_rows: bool) -> StepShape | None:
    """The smallest that takes the step; None: it is too large for all."""
    return next((shape for shape in shapes if shape.takes(tokens, sequences, single_rows)), None)


def fast_shapes(seconds: Mapping[StepShape, float]) -> list[StepShape]:
    """Those whose number of tokens is worth a graph, by the times of the shapes with the most sequences, in order: a number goes for all
    numbers of sequences at once, or a step could be padded to more where it has fewer of them."""
    kept = set[tuple[bool, int]]()
    for single_rows in (False, True):
        ascending = sorted(shape for shape in seconds if shape.has_single_rows == single_rows)
        by_tokens = {shape.tokens: seconds[shape] for shape in ascending}             # of several the last: with the most sequences
        kept |= {(single_rows, tokens) for tokens in not_outrun(by_tokens)}
    return sorted(shape for shape in seconds if (shape.has_single_rows, shape.tokens) in kept)


def padded_rows(shapes: Iterable[StepShape]) -> list[int]:
    """To what steps with single rows are padded, ascending."""
    return sorted({shape.tokens for shape in shapes if shape.has_single_rows})


@dataclass(frozen=True)
class PromptStep:
    """One step, on the host. R sequences sample."""

    packed: PackedBatch                  # logit_rows: [R]
    pending_rows: NDArray[np.int64]
    sources: NDArray[np.int64]
    real: NDArray[np.float32]            # [4, R]
    top_k: NDArray[np.int32]             # [R]
    share_tokens: int = 1                # of single rows' contexts

    @property
    def aligned_real(self) -> NDArray[np.float32]:
        """[4, R or a few more]: each row begins at a multiple of 16 bytes, as rows within a shape's inputs do. Triton compiles another
        variant of a kernel for a pointer that does not, and a request would wait for that.
        """
        num_drawn = self.real.shape[1]
        aligned = np.zeros((4, -(-num_drawn // 4) * 4), dtype=np.float32)
        aligned[:, :num_drawn] = self.real
        return aligned

    @property
    def has_single_rows(self) -> bool:
        return bool((np.diff(self.packed.query_starts) == 1).any())

    @property
    def is_whole_prompt(self) -> bool:
        contexts, rows = self.packed.context_lens, len(self.packed.token_ids)
        return len(contexts) == 1 and rows > 1 and int(contexts[0]) == rows


@dataclass(frozen=True)
class StepInputs(Generic[Array]):
    """A shape's inputs, T tokens and B sequences, as parts of one buffer: Tensors on the device, arrays on the host."""

    token_ids: Array          # [T + 1] int64: the last one takes what is pending nowhere
    positions: Array          # [T] int64
    slots: Array              # [T] int64; -1: padding
    logit_rows: Array         # [B] int64
    pending_rows: Array       # [B] int64: rows whose tokens are still on the device; T for none
    sources: Array            # [B] int64: where in `sampled` those are
    query_starts: Array       # [B + 1] int32
    context_lens: Array       # [B] int32
    top_k: Array              # [B] int32
    real: Array               # [4, B] fp32: temperature, top_p, min_p, fraction
    share_tokens: Array       # [1] int32
    block_tables: Array       # [B, max_blocks] int32


def inputs_within(buffer: Tensor, shape: StepShape, max_blocks: int) -> tuple[StepInputs[Tensor], int]:
    """→ views of `buffer`, uint8, and how many of its bytes they take."""
    tokens, sequences, end = shape.tokens, shape.sequences, 0

    def take(dtype: torch.dtype, *size: int) -> Tensor:
        nonlocal end
        start, end = end, end + -(-dtype.itemsize * math.prod(size) // ALIGNMENT) * ALIGNMENT
        return buffer[start : start + dtype.itemsize * math.prod(size)].view(dtype).view(size)

    inputs = StepInputs(
        token_ids=take(torch.int64, tokens + 1),
        positions=take(torch.int64, tokens),
        slots=take(torch.int64, tokens),
        logit_rows=take(torch.int64, sequences),
        pending_rows=take(torch.int64, sequences),
        sources=take(torch.int64, sequences),
        query_starts=take(torch.int32, sequences + 1),
        context_lens=take(torch.int32, sequences),
        top_k=take(torch.int32, sequences),
        real=take(torch.float32, 4, sequences),
        share_tokens=take(torch.int32, 1),
        block_tables=take(torch.int32, sequences, max_blocks),
    )
    return inputs, end


def fill(inputs: StepInputs[NDArray[Any]], step: PromptStep) -> None:
    """All of `inputs` but what no sequence reads of `block_tables`."""
    packed, num_tokens = step.packed, len(step.packed.token_ids)
    for target, values, padding in (
        (inputs.token_ids, packed.token_ids, 0),
        (inputs.positions, packed.positions, 0),
        (inputs.slots, packed.slots, -1),
        (inputs.logit_rows, packed.logit_rows, 0),
        (inputs.pending_rows, step.pending_rows, len(inputs.positions)),
        (inputs.sources, step.sources, 0),
        (inputs.query_starts, packed.query_starts, num_tokens),
        (inputs.context_lens, packed.context_lens, 0),
        (inputs.top_k, step.top_k, 0),
    ):
        target[: len(values)] = values
        target[len(values) :] = padding
    inputs.share_tokens[0] = step.share_tokens
    num_drawn = step.real.shape[1]
    inputs.real[:, :num_drawn] = step.real
    inputs.real[:, num_drawn:] = 0                     # temperature 0: nothing is drawn
    tables = packed.block_tables
    inputs.block_tables[: len(tables), : tables.shape[1]] = tables
