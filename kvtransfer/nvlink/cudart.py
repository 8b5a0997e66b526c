"""What CUDA's runtime offers and torch does not: plain allocations, IPC handles, mapped host memory. The one place that knows IPC.

The library is the one that torch has loaded, so both share one context. Every call is for the current device.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_void_p
from functools import cache
from pathlib import Path

import torch

from ...messages.errors import ClusterError

HANDLE_BYTES = 64
LAZY_PEER_ACCESS = 1           # cudaIpcMemLazyEnablePeerAccess
PORTABLE_MAPPED = 1 | 2        # cudaHostRegisterPortable | cudaHostRegisterMapped
ANY_DIRECTION = 4              # cudaMemcpyDefault: from the addresses
BATCHES_SINCE = 13000          # cudaMemcpyBatchAsync in its final form
IN_STREAM_ORDER = 1            # cudaMemcpySrcAccessOrderStream
OUT_OF_MEMORY = 2
NATIVE_ATOMICS = 3             # cudaDevP2PAttrNativeAtomicSupported


class CudaError(Exception):
    """`code` is a cudaError_t."""

    def __init__(self, call: str, code: int, words: str) -> None:
        super().__init__(f"{call}: {words} ({code})")
        self.code = code


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", c_char * HANDLE_BYTES)]


class _CopyAttributes(ctypes.Structure):
    """cudaMemcpyAttributes; the two locations are hints for managed memory alone."""

    _fields_ = [("source_order", c_int), ("source", c_int * 2), ("target", c_int * 2), ("flags", c_uint)]


@cache
def _library() -> ctypes.CDLL:
    """Raises ClusterError."""
    torch.cuda.init()  # type: ignore[no-untyped-call]
    loaded = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libcudart" in line}
    if not loaded:
        raise ClusterError("transport nvlink: torch has loaded no libcudart")
    library = ctypes.CDLL(min(loaded))
    library.cudaMalloc.argtypes = [POINTER(c_void_p), c_size_t]
    library.cudaFree.argtypes = [c_void_p]
    library.cudaIpcGetMemHandle.argtypes = [POINTER(_Handle), c_void_p]
    library.cudaIpcOpenMemHandle.argtypes = [POINTER(c_void_p), _Handle, c_uint]
    library.cudaIpcCloseMemHandle.argtypes = [c_void_p]
    library.cudaHostRegister.argtypes = [c_void_p, c_size_t, c_uint]
    library.cudaHostGetDevicePointer.argtypes = [POINTER(c_void_p), c_void_p, c_uint]
    library.cudaHostUnregister.argtypes = [c_void_p]
    library.cudaMemcpyAsync.argtypes = [c_void_p, c_void_p, c_size_t, c_int, c_void_p]
    library.cudaDeviceGetP2PAttribute.argtypes = [POINTER(c_int), c_int, c_int, c_int]
    library.cudaRuntimeGetVersion.argtypes = [POINTER(c_int)]
    library.cudaGetErrorString.argtypes, library.cudaGetErrorString.restype = [c_int], c_char_p
    return library


def _check(call: str, *arguments: object) -> None:
    library = _library()
    code = getattr(library, call)(*arguments)
    if code:
        library.cudaGetLastError()             # or the next kernel's launch reports it as its own
        raise CudaError(call, code, library.cudaGetErrorString(code).decode())


def allocate(num_bytes: int) -> int:
    address = c_void_p()
    _check("cudaMalloc", byref(address), num_bytes)
    assert address.value is not None
    return address.value


def free(address: int) -> None:
    _check("cudaFree", address)


def ipc_handle(address: int) -> bytes:
    """Of an allocation's first byte."""
    handle = _Handle()
    _check("cudaIpcGetMemHandle", byref(handle), address)
    return bytes(handle)


def ipc_open(handle: bytes) -> int:
    """The address of another process's allocation on the current device, which reaches it wherever it lies."""
    address = c_void_p()
    _check("cudaIpcOpenMemHandle", byref(address), _Handle.from_buffer_copy(handle), LAZY_PEER_ACCESS)
    assert address.value is not None
    return address.value


def ipc_close(address: int) -> None:
    _check("cudaIpcCloseMemHandle", address)


def map_host(address: int, num_bytes: int) -> int:
    """The device's address of host memory, which from now on cannot be paged out."""
    mapped = c_void_p()
    _check("cudaHostRegister", address, num_bytes, PORTABLE_MAPPED)
    try:
        _check("cudaHostGetDevicePointer", byref(mapped), address, 0)
    except CudaError:
        unmap_host(address)
        raise
    assert mapped.value is not None
    return mapped.value


def unmap_host(address: int) -> None:
    _check("cudaHostUnregister", address)


def copy(target: int, source: int, num_bytes: int, stream: int) -> None:
    _check("cudaMemcpyAsync", target, source, num_bytes, ANY_DIRECTION, stream)


def copy_all(targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int], stream: int) -> None:
    """By the copy engines, in any order among each other: one call where the runtime has it."""
    count = len(sizes)
    if not count or not _has_batches():
        for target, source, num_bytes in zip(targets, sources, sizes, strict=True):
            copy(target, source, num_bytes, stream)
        return
    addresses, lengths = c_void_p * count, c_size_t * count
    attributes, first = _CopyAttributes(IN_STREAM_ORDER), c_size_t(0)
    batch = (addresses(*targets), addresses(*sources), lengths(*sizes), c_size_t(count), byref(attributes), byref(first), c_size_t(1))
    _check("cudaMemcpyBatchAsync", *batch, c_void_p(stream))


@cache
def _has_batches() -> bool:
    version = c_int()
    _check("cudaRuntimeGetVersion", byref(version))
    return version.value >= BATCHES_SINCE


def has_native_atomics(here: int, there: int) -> bool:
    """Whether a kernel on one GPU may add to another one's memory: over NVLink, seldom over PCIe."""
    value = c_int()
    _check("cudaDeviceGetP2PAttribute", byref(value), NATIVE_ATOMICS, here, there)
    return bool(value.value)
