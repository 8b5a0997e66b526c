"""Shapes of steps that have CUDA graphs, and their inputs on the host."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from diptych.engine.packing import PackedBatch
from diptych.engine.prompt_steps import MOST_TOKENS, PromptStep, StepInputs, fill, inputs_within, padded_rows, shape_for, step_shapes

LIMITS = {"max_step_tokens": st.integers(1, 9000), "max_sequences": st.integers(1, 300)}


@given(**LIMITS, tokens=st.integers(2, MOST_TOKENS), share=st.floats(0, 1), single=st.booleans())
def test_a_step_takes_the_smallest_shape_that_holds_it(
    max_step_tokens: int, max_sequences: int, tokens: int, share: float, single: bool
) -> None:
    tokens = min(tokens, max_step_tokens)
    sequences = max(1, min(int(share * tokens) if single else int(share * tokens) // 2, max_sequences))
    shapes = step_shapes(max_step_tokens, max_sequences)
    shape = shape_for(shapes, tokens, sequences, single)
    if single and sequences < tokens:
        assert shape is not None
    if shape is None:
        return
    assert shape.takes(tokens, sequences, single)
    assert shape.sequences < shape.tokens                # or attention would take the step for one of decodes
    assert shape.tokens - tokens < 128
    assert not any(other < shape and other.takes(tokens, sequences, single) for other in shapes)


@given(**LIMITS)
def test_no_shape_is_larger_than_a_step_can_need(max_step_tokens: int, max_sequences: int) -> None:
    shapes = step_shapes(max_step_tokens, max_sequences)
    assert all(shape.sequences <= max_sequences for shape in shapes)
    assert shapes[-1].tokens < max_step_tokens + 64
    assert len(shapes) <= 32 + 3 * 18


@given(**LIMITS, rows=st.integers(2, MOST_TOKENS))
def test_a_step_beside_as_many_decodes_as_there_may_be_is_padded_to_one_of_the_padded_rows(
    max_step_tokens: int, max_sequences: int, rows: int
) -> None:
    shapes = step_shapes(max_step_tokens, max_sequences)
    padded, rows = padded_rows(shapes), min(rows, shapes[-1].tokens)
    shape = shape_for(shapes, rows, min(max_sequences, max(1, rows - 1)), True)
    assert padded == sorted(set(padded))
    assert shape is not None
    assert shape.tokens == min(each for each in padded if each >= rows)


def packed(lengths: list[int]) -> PackedBatch:
    total, count = sum(lengths), len(lengths)
    ints = np.arange(total, dtype=np.int64) + 7
    starts = np.array([0, *np.cumsum(lengths)], dtype=np.int32)
    contexts = np.array(lengths, dtype=np.int32) + 3
    tables = np.full((count, 2), 5, dtype=np.int32)
    return PackedBatch(ints, ints + 1, ints + 2, starts, contexts, tables, starts[1:].astype(np.int64) - 1)


@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=5))
def test_padding_is_stored_nowhere_and_has_no_rows(lengths: list[int]) -> None:
    shape = step_shapes(64, 8)[-1]
    _, num_bytes = inputs_within(torch.empty(1 << 50, dtype=torch.uint8, device="meta"), shape, 4)
    buffer = torch.full((num_bytes,), 0x5A, dtype=torch.uint8)          # what an earlier step left
    views, _ = inputs_within(buffer, shape, 4)
    inputs = StepInputs(**{name: tensor.numpy() for name, tensor in vars(views).items()})
    batch, total, count = packed(lengths), sum(lengths), len(lengths)
    real, top_k = np.full((4, count), 0.5, dtype=np.float32), np.full(count, 3, dtype=np.int32)
    fill(inputs, PromptStep(batch, np.array([total - 1]), np.array([2]), real, top_k))

    assert views.token_ids.tolist() == [*batch.token_ids.tolist(), *[0] * (shape.tokens + 1 - total)]
    assert views.slots.tolist() == [*batch.slots.tolist(), *[-1] * (shape.tokens - total)]
    assert views.query_starts.tolist() == [*batch.query_starts.tolist(), *[total] * (shape.sequences - count)]
    assert views.context_lens.tolist() == [*batch.context_lens.tolist(), *[0] * (shape.sequences - count)]
    assert views.pending_rows.tolist() == [total - 1, *[shape.tokens] * (shape.sequences - 1)]
    assert views.logit_rows.max() < total
    assert views.real[0].tolist() == [*[0.5] * count, *[0.0] * (shape.sequences - count)]
    assert (views.block_tables[:count, :2] == 5).all()


@given(num_drawn=st.integers(0, 40))
def test_what_a_step_without_a_graph_draws_with_is_aligned_too(num_drawn: int) -> None:
    real = np.arange(4 * num_drawn, dtype=np.float32).reshape(4, num_drawn)
    aligned = PromptStep(packed([2]), np.array([0]), np.array([0]), real, np.zeros(num_drawn, dtype=np.int32)).aligned_real
    assert aligned.strides[0] % 16 == 0
    assert (aligned[:, :num_drawn] == real).all()


def test_fields_do_not_overlap() -> None:
    for shape in step_shapes(512, 32):
        _, num_bytes = inputs_within(torch.empty(1 << 50, dtype=torch.uint8, device="meta"), shape, 3)
        buffer = torch.zeros(num_bytes, dtype=torch.uint8)
        views, _ = inputs_within(buffer, shape, 3)
        for number, tensor in enumerate(vars(views).values()):
            tensor.fill_(number)
        for number, tensor in enumerate(vars(views).values()):
            assert (tensor == number).all()
