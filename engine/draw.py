"""How the token of each row is drawn on a device: what `kernels/sampling.py` is given, on the host."""

from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from .sampler import uniform
from .sequence import Sequence as Seq


class Draw(Struct, frozen=True):
    """Meanings and ranges as in SamplingParams."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    fraction: float    # the uniform number


DRAWN_AGAIN = Draw(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, fraction=0.0)
"""Of a row whose logits are changed later: only whether they are finite counts."""


def draw_of(sequence: Seq) -> Draw:
    sampling = sequence.request.sampling
    fraction = uniform(sampling.seed, sequence.num_outputs) if sampling.temperature > 0 else 0.0
    return Draw(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, fraction)


def columns(draws: Sequence[Draw]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """[4, R] of temperature, top_p, min_p and fraction; [R] of top_k."""
    real = [d.temperature for d in draws], [d.top_p for d in draws], [d.min_p for d in draws], [d.fraction for d in draws]
    return np.array(real, dtype=np.float32), np.array([d.top_k for d in draws], dtype=np.int32)
