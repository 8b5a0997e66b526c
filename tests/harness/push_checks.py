"""The page push against plain indexing, in the interpreter and on a GPU."""

import torch
from torch import Tensor

from diptych.kernels.page_push import Counting, IdBuffers, PushShape, push_pages


def check_push(page_words: int, num_pages: int, shape: PushShape, device: torch.device) -> None:
    """Scattered pages arrive, nothing else changes, the count of one counter rises by their number."""
    pool_pages = num_pages + 5
    generator = torch.Generator().manual_seed(page_words + num_pages)
    source = torch.randint(-(2**62), 2**62, (pool_pages, page_words), generator=generator).to(device)
    target = torch.randint(-(2**62), 2**62, (pool_pages, page_words), generator=generator).to(device)
    here, there = (torch.randperm(pool_pages, generator=generator)[:num_pages].to(device) for _ in range(2))
    counters = torch.arange(8, device=device)
    arrived, lock = (torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2))
    expected = target.clone()
    expected[there] = source[here]
    for launch in range(2):                    # the second finds `arrived` as the first left it
        ids = torch.cat((here, there))
        page_ids = IdBuffers(ids, torch.full_like(ids, -(2**40)))             # ids that nobody has fetched lead nowhere
        times = torch.zeros(2, dtype=torch.int64, device=device)
        counting = Counting(counters, 3, num_pages, arrived, lock, times)
        push_pages(source.view(-1), target.view(-1), page_ids, num_pages, page_words, counting, shape)
        assert_same(target, expected)
        assert counters.tolist() == [0, 1, 2, 3 + (launch + 1) * num_pages, 4, 5, 6, 7]
        began, ended = times.tolist()
        assert 0 < began <= ended
    assert arrived.item() == lock.item() == 0


def assert_same(one: Tensor, other: Tensor) -> None:
    assert torch.equal(one, other), f"{(one != other).sum().item()} of {one.numel()} words differ"
