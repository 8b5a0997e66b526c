"""Decode attention over contexts as a trace has them, on one GPU: `python tests/bench/decode_contexts.py TRACE.csv [batch ...]`.

Llama-3-8B's heads, one line a batch: two draws of contexts (a request that answers with n tokens is met with a chance that goes with n),
and as many contexts of 1024. µs of attention, merge and list, a layer of 32, in one CUDA graph; beside them the time in which a copy would
read the keys and values.
"""

import random
import sys
import time
from pathlib import Path

import torch
from decode_sweep import KV_HEADS, MAX_CONTEXT, Batch
from triton.testing import do_bench_cudagraph

from diptych.cluster.bench.traces import read_trace
from diptych.cluster.bench.workload import TimedRequest
from diptych.kernels.context_shares import most_shares, share_tokens

BATCHES = (8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 96, 128)
LAYERS = 32
COPY_BYTES = 1 << 30


def drawn(requests: list[TimedRequest], batch: int, seed: int) -> list[int]:
    draw = random.Random(1000 * batch + seed)
    met = draw.choices(requests, weights=[request.output_tokens for request in requests], k=batch)
    return [request.prompt_tokens + draw.randint(1, request.output_tokens) for request in met]


def copied_bytes_per_us() -> float:
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (1e3 * float(do_bench_cudagraph(lambda: target.copy_(source), rep=20, return_mode="median")))


def cell(contexts: list[int], num_sms: int, bytes_per_us: float) -> str:
    share, splits = share_tokens(contexts, KV_HEADS, num_sms), most_shares(len(contexts), KV_HEADS, MAX_CONTEXT, num_sms)
    inputs = Batch(contexts, LAYERS, share)
    us = inputs.time_us(splits)
    return f"{us:8.1f} ({us * bytes_per_us / inputs.layer_bytes:4.2f})"


def main() -> None:
    started = time.monotonic()
    trace = Path(sys.argv[1])
    requests = [each for each in read_trace(trace).requests if 0 < each.output_tokens <= MAX_CONTEXT - each.prompt_tokens]
    num_sms, bytes_per_us = torch.cuda.get_device_properties(0).multi_processor_count, copied_bytes_per_us()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, a copy moves {bytes_per_us / 1e6:.2f} TB/s")
    print(f"{'':>6}{'one draw':>16}{'another':>16}{'1024 each':>16}   µs a layer (of a copy's time)")
    for batch in map(int, sys.argv[2:]) if sys.argv[2:] else BATCHES:
        draws = [drawn(requests, batch, 1), drawn(requests, batch, 2), [1024] * batch]
        print(f"{f'b{batch}':>6}" + "".join(f"{cell(contexts, num_sms, bytes_per_us):>16}" for contexts in draws), flush=True)
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
