"""Which CUDA graphs are worth having: those that no larger one outruns.

A library picks its kernels by the number of rows, and may pick badly: 448 rows of an 8B model took an H100 16.6 ms, 512 rows 11.9.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

Shape = TypeVar("Shape")
REPLAYS = 2                     # the first loads what the graph needs


def undominated(seconds: Mapping[Shape, float], holds: Callable[[Shape, Shape], bool]) -> list[Shape]:
    """In the order given. `holds(a, b)`: whatever b can take, a can take too."""
    return [
        shape
        for shape, own_s in seconds.items()
        if not any(other != shape and holds(other, shape) and other_s < own_s for other, other_s in seconds.items())
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
