"""Compiles Triton kernels for sm_90 on any machine, with the arguments that the project's own launchers give them.

    with captured(module, "_kernel") as launches: launcher(meta tensors)   →   resources(launches[0])   →   registers, spills, shared memory

A launch is recorded instead of run, specialised as Triton's launcher does it (1 is a constant, multiples of 16 are known as such), then
compiled, and the PTX goes through the `ptxas` that Triton brings along. Not in a process with TRITON_INTERPRET=1.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from diptych.kernels import overlap

HOPPER = GPUTarget("cuda", 90, 32)
LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")
DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Launch:
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int | None]


@dataclass(frozen=True)
class Resources:
    registers: int            # of a thread
    spill_bytes: int          # stores and loads
    stack_bytes: int
    shared_bytes: int
    ptx: str


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            options = {name: kwargs.pop(name) for name in LAUNCH_OPTIONS if name in kwargs}
            self._launches.append(Launch(self._kernel, dict(zip(self._kernel.arg_names, args, strict=False)) | kwargs, options))

        return launch


@contextmanager
def captured(module: ModuleType, *names: str) -> Iterator[list[Launch]]:
    """Within it, launches of the module's kernels of these names go to the list and nowhere else."""
    launches: list[Launch] = []
    recorders = {name: _Recorder(getattr(module, name), launches) for name in names}
    with patch.object(overlap, "device_overlaps", lambda: True), patch.multiple(module, **recorders):
        yield launches


def resources(launch: Launch) -> Resources:
    compiled = triton.compile(_source(launch), target=HOPPER, options=launch.options)
    report = _ptxas(compiled.asm["ptx"])
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill", report)]
    return Resources(
        registers=int(_only(r"Used (\d+) registers", report)),
        spill_bytes=sum(spills),
        stack_bytes=int(_only(r"(\d+) bytes stack frame", report)),
        shared_bytes=compiled.metadata.shared,
        ptx=compiled.asm["ptx"],
    )


def _only(pattern: str, report: str) -> str:
    found = re.findall(pattern, report)
    assert len(found) == 1, f"{pattern!r} in ptxas's report:\n{report}"
    return str(found[0])


def _source(launch: Launch) -> ASTSource:
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    assert launch.kernel.arg_names == list(launch.arguments), f"{launch.kernel.arg_names} launched with {list(launch.arguments)}"
    for place, (parameter, value) in enumerate(zip(launch.kernel.params, launch.arguments.values(), strict=True)):
        kind = "constexpr" if parameter.is_constexpr else _kind(value)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = DIVISIBLE
    return ASTSource(launch.kernel, signature, constants, attributes)


def _kind(value: object) -> str:
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return f"*{POINTEES[value.dtype]}"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{POINTEES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int), f"{value!r} cannot be a kernel's argument"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


POINTEES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


def _ptxas(ptx: str) -> str:
    """What the assembler says of one kernel's resources."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(ptxas), "-v", "--gpu-name=sm_90a", "-o", str(Path(folder) / "kernel.cubin"), str(source)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stderr
