"""What converting pages costs a prefill worker: `python tests/bench/conversion.py [cuda]` prints GB/s of pages made, one layer at a time.

KV of 2048 tokens in the shape of an 8B model (8 KV heads of 128), in scattered blocks; one thread; the median of the rounds. Beside it:
the same bytes copied, which is what a staging pool costs where nothing has to be converted, and the hashing of a prompt's blocks. On a GPU
8192 tokens and 32 layers, and what the host takes of it, whose calls come back before the pages are made.
"""

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from diptych.engine.block_pool import chain_hashes
from diptych.kvtransfer.conversion import Converter
from diptych.kvtransfer.layout import KVLayout
from diptych.kvtransfer.transport import KVPool

DEVICE = "cuda" if "cuda" in sys.argv else "cpu"
NUM_TOKENS, NUM_LAYERS = (2048, 4) if DEVICE == "cpu" else (8192, 32)
ROUNDS = 9
BF16, FP32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
CASES = [
    (BF16, 64, BF16, 64), (BF16, 64, BF16, 16), (BF16, 16, BF16, 64), (FP32, 16, BF16, 16), (BF16, 64, FP8, 64), (BF16, 64, FP8, 16),
    (FP32, 16, FP8, 16),
]  # fmt: skip


def pool_of(dtype: torch.dtype, block_size: int) -> KVPool:
    layout = KVLayout("bench", dtype, NUM_LAYERS, 8, 128, block_size)
    return KVPool(layout, torch.randn(layout.shape(NUM_TOKENS // block_size), device=DEVICE).to(dtype))


def median_s(act: Callable[[], object]) -> tuple[float, float]:
    """Until all is made, and until the calls are back."""
    times = []
    for _ in range(ROUNDS + 2):
        started = time.perf_counter()
        act()
        returned = time.perf_counter()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started, returned - started))
    whole, calls = map(statistics.median, zip(*times[2:], strict=True))
    return whole, calls


def main() -> None:
    torch.set_num_threads(1)
    for here, size, there, other_size in CASES:
        source, target = pool_of(here, size), pool_of(there, other_size)
        converter = Converter(source, target, torch.ones(NUM_LAYERS, 2, 8, device=DEVICE))
        blocks, num_pages = np.random.default_rng(0).permutation(source.num_blocks), target.num_blocks * NUM_LAYERS
        layers = [np.arange(layer, num_pages, NUM_LAYERS) for layer in range(NUM_LAYERS)]

        def make(converter: Converter = converter, layers: list = layers, blocks: np.ndarray = blocks) -> None:
            for pages in layers:
                converter.make(pages, pages, blocks)

        (seconds, calls), num_bytes = median_s(make), target.tensor.nbytes
        pages = f"{seconds / num_pages * 1e6:.2f} µs a page of {target.layout.page_bytes >> 10} KiB"
        layer = f"{seconds / NUM_LAYERS * 1e6:.0f} µs a layer, {calls / NUM_LAYERS * 1e6:.0f} until its call is back"
        print(f"{here} {size} → {there} {other_size}: {num_bytes / seconds / 1e9:.2f} GB/s, {pages}, {layer}")
    for block_size in (16, 64):
        tokens = list(range(8192))
        seconds, _ = median_s(lambda size=block_size, tokens=tokens: chain_hashes(tokens, size))
        print(f"hashes of 8192 tokens in blocks of {block_size}: {seconds * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
