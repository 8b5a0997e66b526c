"""Which CUDA graphs are worth having: those that no larger one outruns by far.

A library picks its kernels by the number of rows, and may pick badly: 448 rows of an 8B model took an H100 16.6 ms, 512 rows 11.9.
"""

from collections.abc import Mapping, Sequence

import torch

MARGIN = 0.05                   # by which a larger one has to be faster: times vary, and a step of padding alone is not all of a step
REPLAYS = 3                     # the first loads what the graph needs


def not_outrun(seconds: Mapping[int, float]) -> list[int]:
    """Of the sizes in `seconds`, ascending, those that are to be kept; the largest always is."""
    return [
        size
        for size, own_s in sorted(seconds.items())
        if not any(other > size and other_s < (1 - MARGIN) * own_s for other, other_s in seconds.items())
    ]


def replay_s(graphs: Sequence[torch.cuda.CUDAGraph]) -> float:
    """One after the other, all together: the least of a few times. Waits for the device."""
    times = []
    for _ in range(REPLAYS):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))   # type: ignore[no-untyped-call]
        started.record()
        for graph in graphs:
            graph.replay()
        ended.record()
        ended.synchronize()
        times.append(float(started.elapsed_time(ended)) / 1e3)
    return min(times)
