"""The unpacking of a decode step's upload against the same in plain Python."""

import numpy as np
import torch
from harness.kernel_checks import Device

from diptych.engine.decode_rows import DecodeRow, pack_decodes
from diptych.engine.draw import DRAWN_AGAIN
from diptych.kernels.decode_inputs import HEADER, decode_inputs, fetch_pending
from diptych.kernels.ops import Paging

BLOCK_SIZE = 16
POISON = -7777


def check_decode_inputs(contexts: list[int], num_padding: int, device: Device) -> None:
    """Every second row's token is on the device. What a table holds past its context, and all of a padding row's, stays as it was."""
    count, size = len(contexts), len(contexts) + num_padding
    generator = device.generator()
    blocks = [torch.randint(0, 10_000, (-(-context // BLOCK_SIZE),), generator=generator).tolist() for context in contexts]
    sampled = torch.randint(0, 1000, (size,), generator=generator)
    sampled[0] = -1                                                     # logits that were no numbers
    sources = [row if row % 2 == 0 else -1 for row in range(count)]
    given = torch.randint(0, 1000, (count,), generator=generator).tolist()
    rows = [DecodeRow(*row, DRAWN_AGAIN) for row in zip(contexts, sources, given, blocks, strict=True)]
    packed = np.zeros(len(HEADER) * size + sum(map(len, blocks)), dtype=np.int32)
    assert pack_decodes(rows, size, 1, packed) == len(packed)
    upload = torch.from_numpy(packed).to(device.name)

    token_ids, positions, slots = (torch.full((size,), POISON, device=device.name) for _ in range(3))
    context_lens = torch.full((size,), POISON, dtype=torch.int32, device=device.name)
    tables = torch.full((size, max(map(len, blocks)) + 3), POISON, dtype=torch.int32, device=device.name)
    paging = Paging(torch.arange(size + 1, dtype=torch.int32, device=device.name), context_lens, tables)
    decode_inputs(token_ids, positions, slots, paging, upload, sampled.to(device.name), BLOCK_SIZE)

    tokens = [max(0, int(sampled[source])) if source >= 0 else token for source, token in zip(sources, given, strict=True)]
    ends = [(row[(context - 1) // BLOCK_SIZE], (context - 1) % BLOCK_SIZE) for row, context in zip(blocks, contexts, strict=True)]
    assert token_ids[:count].tolist() == tokens
    assert positions[:count].tolist() == [context - 1 for context in contexts]
    assert slots.tolist() == [block * BLOCK_SIZE + offset for block, offset in ends] + [-1] * num_padding
    assert context_lens.tolist() == contexts + [0] * num_padding
    for table, row in zip(tables.tolist(), [*blocks, *[[]] * num_padding], strict=True):
        assert table == row + [POISON] * (len(table) - len(row))


def check_pending(count: int, device: Device) -> None:
    """Only the rows that are named are written; a token that came of no numbers is 0."""
    generator = device.generator()
    sampled = torch.randint(-1, 1000, (64,), generator=generator)
    sources, rows = torch.randint(0, 64, (count,), generator=generator), torch.randperm(count + 9, generator=generator)[:count]
    token_ids = torch.full((count + 9,), POISON, device=device.name)
    fetch_pending(token_ids, rows.to(device.name), sources.to(device.name), sampled.to(device.name))
    expected = torch.full((count + 9,), POISON)
    expected[rows] = sampled[sources].clamp_min(0)
    assert torch.equal(token_ids.cpu(), expected)
