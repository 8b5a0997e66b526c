"""The page push against plain indexing, in the interpreter and on a GPU."""

import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from diptych.kernels.page_push import Counting, IdBuffers, PushShape, Turns, push_pages


def check_push(page_words: int, num_pages: int, shape: PushShape, device: torch.device) -> None:
    """Scattered pages arrive, nothing else changes, the count of one counter rises by their number."""
    pool_pages = num_pages + 5
    generator = torch.Generator().manual_seed(page_words + num_pages)
    source = torch.randint(-(2**62), 2**62, (pool_pages, page_words), generator=generator).to(device)
    target = torch.randint(-(2**62), 2**62, (pool_pages, page_words), generator=generator).to(device)
    here, there = (torch.randperm(pool_pages, generator=generator)[:num_pages].to(device) for _ in range(2))
    counters = torch.arange(8, device=device)
    arrived, lock = (torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2))
    finished = torch.full((1,), 2**31 - 1, dtype=torch.int32, device=device)
    turns = Turns(finished, 2**31 - 1)         # after the first program the number is negative
    expected = target.clone()
    expected[there] = source[here]
    for launch in range(2):                    # the second finds `arrived` as the first left it
        ids = torch.cat((here, there))
        page_ids = IdBuffers(ids, torch.full_like(ids, -(2**40)))             # ids that nobody has fetched lead nowhere
        times = torch.zeros(2, dtype=torch.int64, device=device)
        counting = Counting(counters, 3, num_pages, arrived, lock, turns, times)
        push_pages(source.view(-1), target.view(-1), page_ids, num_pages, page_words, counting, shape)
        assert_same(target, expected)
        assert counters.tolist() == [0, 1, 2, 3 + (launch + 1) * num_pages, 4, 5, 6, 7]
        began, ended = times.tolist()
        assert 0 < began <= ended
    assert arrived.item() == lock.item() == 0
    assert (turns.num_launched - int(finished.item())) % 2**32 == 0, "later launches would wait for more programs than there were, or fewer"


def check_turn() -> None:
    """In the interpreter, whose kernel runs in a thread: a launch of all programs moves nothing before its turn, a shorter one at once."""
    shape, page_words, num_pages = PushShape(num_programs=4, tile_bytes=2048), 256, 8
    source, target = (torch.full((num_pages, page_words), value) for value in (7, 0))
    finished, arrived, lock = (torch.zeros(1, dtype=torch.int32) for _ in range(3))
    counters, pages = torch.zeros(2, dtype=torch.int64), torch.arange(num_pages)

    def launch(which: int, pages: Tensor) -> None:
        turns = Turns(finished, 8)             # of two launches before it nothing has begun
        counting = Counting(counters, which, len(pages), arrived, lock, turns, torch.zeros(2, dtype=torch.int64))
        ids = torch.cat((pages, pages))
        push_pages(source.view(-1), target.view(-1), IdBuffers(ids, torch.zeros_like(ids)), len(pages), page_words, counting, shape)

    launch(0, pages[:1])
    assert (counters.tolist(), finished.item(), target.any(dim=1).sum().item()) == ([1, 0], 1, 1)
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(launch, 1, pages)
        for num_finished in (1, 5):            # half of the one before would be the sixth
            finished.fill_(num_finished)
            time.sleep(0.3)
            assert (counters.tolist(), target.any(dim=1).sum().item()) == ([1, 0], 1)
        finished.fill_(6)
        long.result()
    assert (counters.tolist(), finished.item()) == ([1, num_pages], 10)
    assert_same(target, source)


def assert_same(one: Tensor, other: Tensor) -> None:
    assert torch.equal(one, other), f"{(one != other).sum().item()} of {one.numel()} words differ"
