"""The kernels that change logits, count tokens and take log-probabilities, against `engine/sampler.py`, which does so in fp64."""

import math
from typing import Any

import torch
from harness.kernel_checks import Device, assert_close
from torch import Tensor

from diptych.engine.row_extras import ChangedRows, CountSlots, Fresh, changed_rows, counted
from diptych.engine.sampler import SamplingRow, _adjusted, score
from diptych.engine.sequence import Sequence
from diptych.kernels.logit_changes import LogitChanges, change_logits, settle
from diptych.kernels.logprobs import token_logprobs
from diptych.messages.ids import Address, Epoch, RequestId, WorkerId
from diptych.messages.requests import GenerateRequest, Route, SamplingParams, WorkerRef

NOBODY = WorkerRef(WorkerId("w"), Epoch(0), Address(""))
NUM_SLOTS, STALE = 12, 99


def wishes(vocab: int) -> list[dict[str, Any]]:
    """Of one sequence each; two want nothing, one has more biases than are added at once."""
    last = vocab - 1
    return [
        {},
        {"repetition_penalty": 1.7},
        {"presence_penalty": 0.75},
        {"frequency_penalty": -0.4},
        {"logit_bias": {0: 3.5, last: -100.0}},
        {"min_tokens": 2, "stop_token_ids": (0, last)},
        {},
        {"repetition_penalty": 0.6, "presence_penalty": -0.5, "frequency_penalty": 0.3, "logit_bias": {0: 1.0, last // 2: -2.0}},
        {"frequency_penalty": 0.2, "min_tokens": 9, "stop_token_ids": (last,), "logit_bias": {last: 50.0}},
        {"logit_bias": {token: token % 7 - 3.0 for token in range(0, vocab, 2)}},
    ]


def check_logit_changes(vocab: int, device: Device, tile: int, dtype: torch.dtype) -> None:
    """Three steps: tokens that a step samples are counted by the next, without being told of."""
    generator, slots = device.generator(), CountSlots(NUM_SLOTS)
    sequences = [sequence_of(i, vocab, options, generator) for i, options in enumerate(wishes(vocab))]
    counts = torch.full((NUM_SLOTS, vocab), STALE, dtype=torch.int16, device=device.name)
    sampled = torch.zeros(len(sequences), dtype=torch.int64, device=device.name)
    for step in range(3):
        logits = (3 * torch.randn(len(sequences), vocab, generator=generator)).to(dtype)
        changed, fresh = changed_rows(sequences, slots)
        assert changed is not None
        assert bool(fresh) == (step == 0)
        if fresh:
            _count(counts, counted(fresh, vocab))
        changes = changes_of(changed, device)
        found = change_logits(logits.to(device.name), counts, changes, tile)
        expected = torch.stack([_adjusted(logits[row].double(), row_of(sequences[row])) for row in changed.rows.tolist()])
        assert torch.equal(found.isinf().cpu(), expected.isinf()), f"other tokens are masked, seed {device.seed}"
        assert_close(found.cpu().nan_to_num(neginf=0.0), expected.nan_to_num(neginf=0.0), 1e-6, device)
        sampled.copy_(logits.float().argmax(1))
        settle(sampled, found.argmax(1), counts, changes)
        tokens = logits.float().argmax(1)
        tokens[changed.rows.tolist()] = found.argmax(1).cpu()
        assert sampled.tolist() == tokens.tolist()
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.token_ids.append(token)
    unused = sorted(set(range(NUM_SLOTS)) - set(changed.slots.tolist()))
    assert bool((counts[unused] == STALE).all()), "a row of another sequence was written to"


def check_settling(device: Device) -> None:
    """A row whose logits were no numbers stays so, and is not counted; a count that is full stays full."""
    sampled = torch.tensor([5, -1, 6, 7], device=device.name)
    counts = torch.zeros(2, 8, dtype=torch.int16)
    counts[0, 3], counts[1, 3] = 32767, -1
    counts = counts.to(device.name)
    before = counts.clone()
    ints = {"dtype": torch.int32, "device": device.name}
    nothing = torch.zeros(0, device=device.name)
    rows, slots = torch.tensor([1, 3, 0], **ints), torch.tensor([0, 0, 1], **ints)
    changes = LogitChanges(rows, slots, nothing, nothing, nothing, nothing, nothing, nothing)
    settle(sampled, torch.tensor([2, 3, 3], device=device.name), counts, changes)
    assert sampled.tolist() == [3, -1, 6, 3]
    assert torch.equal(counts, before)


def check_logprobs(vocab: int, device: Device, tile: int, dtype: torch.dtype) -> None:
    """Given and sampled tokens, none to twenty of the likeliest, of logits of which many are equal in every other row."""
    generator = device.generator()
    logits = (4 * torch.randn(9, vocab, generator=generator)).to(dtype)
    logits[1::2] = logits[1::2].round()
    rows, num_top = [8, 0, 1, 1, 2, 3, 5, 7], [min(count, vocab) for count in (0, 1, 2, 20, 5, 20, 3, 0)]
    sampled = torch.randint(0, vocab, (4,), generator=generator)
    sampled[2] = -1                                   # of logits that are no numbers: whatever comes, nothing is read out of bounds
    tokens = [0, -1, vocab - 1, -2, vocab // 2, -4, 1 % vocab, -3]
    there = (torch.tensor(each, dtype=torch.int32, device=device.name) for each in (rows, tokens, num_top))
    at, which, count = there
    logprobs, ids = token_logprobs(logits.to(device.name), at, which, sampled.to(device.name), count, max(num_top), tile)
    known = [int(sampled[-1 - token]) if token < 0 else token for token in tokens][:-1]
    for i, expected in enumerate(score(logits[rows[:-1]].double(), known, num_top[:-1])):
        assert ids[i, : num_top[i]].tolist() == [token for token, _ in expected.top], f"row {i}, seed {device.seed}"
        for found, exact in zip(logprobs[i].tolist(), [expected.logprob, *(value for _, value in expected.top)], strict=False):
            assert math.isclose(found, exact or 0.0, rel_tol=1e-5, abs_tol=2e-5), f"row {i}: {found}, not {exact}; seed {device.seed}"


def check_logprobs_of_no_numbers(vocab: int, device: Device, tile: int) -> None:
    logits = torch.randn(7, vocab, generator=device.generator())
    for row, place, value in ((1, 0, torch.nan), (3, vocab - 1, torch.inf), (5, vocab // 2, -torch.inf)):
        logits[row, place] = value
    rows, zeros = torch.arange(7, dtype=torch.int32, device=device.name), torch.zeros(7, dtype=torch.int32, device=device.name)
    logprobs, _ = token_logprobs(logits.to(device.name), rows, zeros, zeros.long(), zeros, 0, tile)
    assert logprobs[:, 0].isnan().tolist() == [row in (1, 3, 5) for row in range(7)]


def changes_of(changed: ChangedRows, device: Device) -> LogitChanges:
    return LogitChanges(*(torch.from_numpy(array).to(device.name) for array in changed.arrays))


def _count(counts: Tensor, fresh: Fresh) -> None:
    counts[torch.from_numpy(fresh.slots)] = 0
    counts.view(-1)[torch.from_numpy(fresh.places).to(counts.device)] = torch.from_numpy(fresh.counts).to(counts.device)


def sequence_of(index: int, vocab: int, options: dict[str, Any], generator: torch.Generator) -> Sequence:
    """Of a request that another worker has answered in part."""
    tokens = torch.randint(0, vocab, (30,), generator=generator).tolist()
    sampling = SamplingParams(max_tokens=40, seed=index, **{"temperature": 0.0} | options)
    request = GenerateRequest(
        RequestId(str(index)), Address(""), tuple(tokens), sampling, Route(decode=NOBODY), math.inf, num_prior_outputs=index % 3 * 5
    )
    return Sequence(request, index, math.inf, math.inf, hands_off=False, max_len=100)


def row_of(sequence: Sequence) -> SamplingRow:
    first = sequence.num_prompt_tokens
    return SamplingRow(sequence.request.sampling, sequence.token_ids[:first], sequence.token_ids[first:])
