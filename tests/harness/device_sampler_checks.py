"""A GPU's sampler, with its staging and its tables, against the CPU's, step after step: on a GPU, or in Triton's interpreter."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from harness.kernel_checks import Device
from harness.logit_checks import row_of, sequence_of, wishes

from diptych.engine.device_sampler import DeviceSampler
from diptych.engine.draw import DRAWN_AGAIN, columns, draw_of
from diptych.engine.row_extras import CountSlots, changed_rows, counted, scored_rows
from diptych.engine.sampler import sample as sample_on_host
from diptych.engine.scheduler import Chunk
from diptych.engine.sequence import Sequence as Seq
from diptych.kernels.sampling import Draws, sample

EXTRAS: list[dict[str, Any]] = [
    {"logprobs": 3},
    {"logprobs": 0, "frequency_penalty": 0.8},
    {"temperature": 0.8, "top_k": 9, "presence_penalty": 0.5, "logprobs": 1},
]


def check_device_sampler(vocab: int, device: Device) -> None:
    """Decodes of four steps; the fourth without every other sequence of the third, so that a place in the table changes hands."""
    generator = device.generator()
    sequences = [sequence_of(i, vocab, options, generator) for i, options in enumerate([*wishes(vocab), *EXTRAS])]
    sampled = torch.zeros(len(sequences), dtype=torch.int64, device=device.name)
    slots, sampler = CountSlots(len(sequences)), DeviceSampler(sampled, vocab, max_model_len=64)
    for step in range(4):
        batch = sequences[::2] if step == 2 else sequences
        logits = 3 * torch.randn(len(batch), vocab, generator=generator)
        expected = sample_on_host(logits, [row_of(each) for each in batch])
        there = logits.to(device.name)
        changed, fresh = changed_rows(batch, slots)
        assert changed is not None
        sample(there, _draws(batch, changed.sequences, device), refuse_infinite=True, out=sampled[: len(batch)])
        if fresh:
            sampler.count(counted(fresh, vocab))
        sampler.draw_changed(there, changed)
        rows = scored_rows([Chunk(each, len(each.token_ids) - 1, 1) for each in batch], vocab)
        assert rows is not None
        scores = sampler.score(there, rows)
        if device.name == "cuda":
            torch.cuda.synchronize()
        tokens = sampled[: len(batch)].tolist()
        assert tokens == [one.token_id for one in expected], f"step {step}, seed {device.seed}"
        for (_, found), one in zip(scores.of_chunks(tokens), expected, strict=True):
            assert (found is None) == (one.logprob is None)
            if found is not None and one.logprob is not None and found.logprob is not None:
                assert math.isclose(found.logprob, one.logprob, rel_tol=1e-5, abs_tol=1e-5)
                assert [token for token, _ in found.top] == [token for token, _ in one.top]
        for each, token in zip(batch, tokens, strict=True):
            each.token_ids.append(token)


def without_pinned_memory(patch: pytest.MonkeyPatch) -> None:
    """For a machine that has none to give."""
    empty = torch.empty
    patch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))


def _draws(batch: Sequence[Seq], again: Sequence[Seq], device: Device) -> Draws:
    real, top_k = columns([DRAWN_AGAIN if each in again else draw_of(each) for each in batch])
    temperature, top_p, min_p, fraction = (torch.from_numpy(row.copy()).to(device.name) for row in real)
    return Draws(temperature, torch.from_numpy(top_k).to(device.name), top_p, min_p, fraction)
