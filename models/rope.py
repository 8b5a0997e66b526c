"""The angles of rotary position embedding (RoFormer, arXiv 2104.09864) and the two scalings served: linear and Llama 3's."""

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor


class RopeKind(StrEnum):
    DEFAULT = "default"
    LINEAR = "linear"         # all frequencies divided by `factor`
    LLAMA3 = "llama3"         # long wavelengths divided by `factor`, short ones kept, a ramp between


@dataclass(frozen=True)
class RopeConfig:
    theta: float
    kind: RopeKind = RopeKind.DEFAULT
    factor: float = 1.0
    low_freq_factor: float = 1.0      # llama3: wavelengths over original_context / low_freq_factor are scaled
    high_freq_factor: float = 4.0     # llama3: wavelengths under original_context / high_freq_factor are kept
    original_context: int = 8192      # llama3: tokens of context before it was stretched


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each dimension pair → [head_dim / 2] fp32.

    Every operation is in fp32 and in the order of Hugging Face's, whose angles at long positions depend on it.
    """
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if rope.kind is RopeKind.LINEAR:
        return frequencies / rope.factor
    if rope.kind is RopeKind.LLAMA3:
        return _llama3(rope, frequencies)
    return frequencies


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    kept = (rope.original_context / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    ramp = (1 - kept) * frequencies / rope.factor + kept * frequencies
    long = wavelengths > rope.original_context / rope.low_freq_factor
    short = wavelengths < rope.original_context / rope.high_freq_factor
    return torch.where(long, frequencies / rope.factor, torch.where(short, frequencies, ramp))


def rope_table(rope: RopeConfig, head_dim: int, max_position: int) -> Tensor:
    """Cosines, then sines, of every position's angles → [max_position, head_dim] fp32."""
    angles = torch.arange(max_position).float()[:, None] * inverse_frequencies(rope, head_dim)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
