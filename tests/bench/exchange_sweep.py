"""What it takes ranks to add up, by number of rows, gathered and scattered: microseconds a call, of 20 calls in a CUDA graph on each GPU.

    python tests/bench/exchange_sweep.py [--width 4096] [--ranks 2]
"""

import argparse

import torch

from diptych.engine.ranks import Ranks
from diptych.kernels.exchange import Exchange, ExchangeShape

ROWS = (1, 16, 64, 128, 256, 512, 2048, 8192)
CALLS, REPLAYS = 20, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    devices = [torch.device("cuda", rank) for rank in range(options.ranks)]
    shape = ExchangeShape(options.ranks, ROWS[-1], options.width, logit_rows=1, logit_columns=1, dtype=torch.bfloat16)
    ends, ranks = Exchange.among(devices, shape), Ranks(devices)
    print(f"{options.ranks} × {torch.cuda.get_device_name()}, rows of {options.width} in bf16")
    for rows in ROWS:
        times = [max(ranks.run(lambda rank: _microseconds(ends[rank], devices[rank], rows, scatters))) for scatters in (False, True)]  # noqa: B023
        print(f"{rows:5} rows: gathered {times[0]:6.1f} µs, scattered {times[1]:6.1f} µs, {rows * options.width * 2 / 1e6:6.2f} MB each")


def _microseconds(end: Exchange, device: torch.device, rows: int, scatters: bool) -> float:
    """The least of some replays: in all ranks at the same time."""
    residual = torch.randn(rows, end.shape.width, device=device).bfloat16()
    weight = torch.ones(end.shape.width, device=device).bfloat16()

    def calls() -> None:
        end.begin()
        for _ in range(CALLS):
            end.add_rms_norm(None, residual, weight, 1e-5, scatters)

    calls()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
        calls()
    times = []
    for _ in range(REPLAYS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize(device)
        times.append(1e3 * began.elapsed_time(ended) / CALLS)
    return min(times[1:])


if __name__ == "__main__":
    main()
