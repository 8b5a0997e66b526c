"""Work of a GPU beside the transfer: what a prefill does on the sender, and what a decode does on the receiver.

"prefill": the matrix products of one Llama-3-8B layer over 2048 tokens in bf16, bound by FLOPs.
"decode": a device copy of 1 GiB, bound by bytes.
"""

from collections.abc import Callable

import torch

PREFILL_TOKENS = 2048
LAYER_SHAPES = [(4096, 6144), (4096, 4096), (4096, 28_672), (14_336, 4096)]     # QKV, out, gate and up, down
PREFILL_KV_BYTES = PREFILL_TOKENS * 2 * 8 * 128 * 2                             # of that layer: K and V of 8 heads of 128
DECODE_BYTES = 1 << 30
WARM_UPS = 3


def compute_ms(kind: str, num_times: int, beside: Callable[[], object] | None, in_order: bool) -> float:
    """Milliseconds of one, over `num_times` in a row. `beside` is called once before each (`in_order`: after, so that what it starts
    follows the work as pages follow their layer)."""
    once, aside = _work(kind), torch.cuda.Stream()                   # type: ignore[no-untyped-call]
    for _ in range(WARM_UPS):
        once()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))       # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    first.record()
    for _ in range(num_times):
        if beside is not None and not in_order:
            with torch.cuda.stream(aside):                           # waits for nothing of the work
                beside()
        once()
        if beside is not None and in_order:
            beside()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / num_times


def _work(kind: str) -> Callable[[], object]:
    if kind == "decode":
        source, target = (torch.empty(DECODE_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
        return lambda: target.copy_(source)
    layer = [(_random(PREFILL_TOKENS, k), _random(k, n), _random(PREFILL_TOKENS, n)) for k, n in LAYER_SHAPES]
    return lambda: [torch.mm(a, b, out=c) for a, b, c in layer]


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
