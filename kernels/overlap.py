"""Programmatic dependent launch: a kernel's programs are placed on the device while the last ones of the kernel before it still run.

    kernel n     ████████████▌
    kernel n+1        wait ──┤█████████      instead of about a microsecond of nothing between them, some 280 times a decode step

Every program of every kernel here begins with `after_predecessor`, before it reads or writes what another kernel reads or writes: it
goes on when all of the kernel before has ended and its stores are visible. By induction, so have all kernels before that one, as long
as no program returns without it. Launches of others (cuBLAS, torch) neither begin early nor let others.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import os
from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def device_overlaps() -> bool:
    """From Hopper on; Triton's interpreter runs kernels one after the other."""
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    return not interprets and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def overlapping() -> dict[str, bool]:
    """What a launch is given: the kernel's own flag and the launcher's."""
    return {"PDL": device_overlaps(), "launch_pdl": device_overlaps()}


@triton.jit
def after_predecessor(PDL: tl.constexpr):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
