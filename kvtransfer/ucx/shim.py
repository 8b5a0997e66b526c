"""The shim's functions in Python: one method each, typed errors instead of codes."""

import ctypes
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_double, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from enum import IntEnum
from functools import cache
from typing import NewType

from msgspec import Struct

from ...messages.errors import ClusterError, DiptychError, PeerGone, TransferError
from ...messages.ids import Imm
from ..transport import IdArray
from .build import build_shim
from .provider import door_settings_text, find_libucp, quiet_loading, settings_text

TEXT_BYTES = 256
UID_BYTES = 16

Link = NewType("Link", int)
"""A pointer of the shim's; dead after `unlink`."""


class MemoryType(IntEnum):
    HOST = 0
    CUDA = 1


class Location(Struct, frozen=True, array_like=True):
    """What a writer must know of a receiver; packed into MemoryDescriptor.location."""

    version: int
    uid: bytes                    # of this life of the receiver
    base: int                     # address of its pool, in its own memory
    num_pages: int
    memory_type: MemoryType
    lent: bool                    # allocated by another transport: UCX emulates puts into it inside a host
    rkey: bytes
    address: bytes                # of its door


class _Code(IntEnum):
    OK = 0
    GONE = 1
    RANGE = 2
    MEMORY = 3
    FAILED = 4


_ERRORS: dict[_Code, type[DiptychError]] = {
    _Code.GONE: PeerGone,
    _Code.RANGE: TransferError,
    _Code.MEMORY: ClusterError,
    _Code.FAILED: ClusterError,
}

_PAGES = POINTER(c_int64)
_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "dx_open": (c_int, (c_char_p, c_char_p, c_char_p, c_char_p, c_uint32, c_double, POINTER(c_void_p), c_char_p)),
    "dx_version": (c_char_p, ()),
    "dx_allocate": (c_int, (c_void_p, c_uint64, c_uint64, POINTER(c_void_p), c_char_p)),
    "dx_register": (c_int, (c_void_p, c_void_p, c_uint64, c_uint64, c_int, c_char_p, c_char_p)),
    "dx_start": (c_int, (c_void_p, c_char_p)),
    "dx_rkey": (c_void_p, (c_void_p, POINTER(c_size_t))),
    "dx_address": (c_void_p, (c_void_p, POINTER(c_size_t))),
    "dx_num_landed": (c_uint64, (c_void_p, c_uint32)),
    "dx_reset": (None, (c_void_p, c_uint32)),
    "dx_fence": (c_int, (c_void_p, c_char_p, c_double)),
    "dx_link": (c_void_p, (c_void_p, c_char_p, c_uint64, c_uint64, c_int, c_int, c_char_p, c_size_t, c_char_p, c_size_t)),
    "dx_await_open": (c_int, (c_void_p, c_double, c_char_p)),
    "dx_unlink": (c_int, (c_void_p, c_double, c_double)),
    "dx_write": (c_int, (c_void_p, _PAGES, _PAGES, c_size_t, c_uint32, c_void_p, c_char_p)),
    "dx_stop": (c_int, (c_void_p, c_uint32, c_double)),
    "dx_settled": (c_int, (c_void_p, c_uint32)),
    "dx_busy_s": (c_double, (c_void_p, c_uint32)),
    "dx_stats": (None, (c_void_p, POINTER(c_uint64), POINTER(c_double))),
    "dx_close": (None, (c_void_p,)),
    "dx_release": (None, (c_void_p,)),
}
_INSTANT = ("dx_num_landed", "dx_reset")          # an atomic each: cheaper than giving the interpreter's lock away


@cache
def _functions() -> dict[str, Callable[..., object]]:
    path = str(build_shim())
    waiting, instant = ctypes.CDLL(path), ctypes.PyDLL(path)
    functions: dict[str, Callable[..., object]] = {}
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(instant if name in _INSTANT else waiting, name)
        function.restype, function.argtypes = result, list(arguments)
        functions[name] = function
    return functions


class Shim:
    """One process's end. `close` ends all but the memory, which stays until `release` was called once more per allocation."""

    def __init__(self, uid: bytes, num_imms: int, stall_s: float, for_gpu: bool = False) -> None:
        assert len(uid) == UID_BYTES
        self._functions = _functions()
        self.library = find_libucp(for_gpu)
        handle = c_void_p()
        with quiet_loading():
            settings = (settings_text().encode(), door_settings_text().encode())
            self._check("dx_open", self.library.encode(), *settings, uid, num_imms, stall_s, byref(handle))
        assert handle.value is not None
        self._handle = handle.value

    def _call(self, name: str, *arguments: object) -> object:
        return self._functions[name](*arguments)

    def _check(self, name: str, *arguments: object) -> str:
        text = ctypes.create_string_buffer(TEXT_BYTES)
        code = _Code(int(self._call(name, *arguments, text)))  # type: ignore[call-overload]
        words = text.value.decode(errors="replace")
        if code is not _Code.OK:
            raise _ERRORS[code](words)
        return words

    @property
    def version(self) -> str:
        words = self._call("dx_version")
        assert isinstance(words, bytes)
        return words.decode()

    def allocate(self, num_bytes: int, page_bytes: int) -> int:
        """Address of host memory; it takes one more `release` to free it. Raises ClusterError."""
        address = c_void_p()
        self._check("dx_allocate", self._handle, num_bytes, page_bytes, byref(address))
        assert address.value is not None
        return address.value

    def register(self, address: int, num_bytes: int, page_bytes: int, memory_type: MemoryType, driver: str | None = None) -> None:
        """`driver`: CUDA's library, if a stream computes the pages; its context must be current. Raises ClusterError."""
        library = None if driver is None else driver.encode()
        self._check("dx_register", self._handle, address, num_bytes, page_bytes, memory_type, library)

    def start(self) -> None:
        self._check("dx_start", self._handle)

    @property
    def rkey(self) -> bytes:
        return self._bytes("dx_rkey")

    @property
    def address(self) -> bytes:
        return self._bytes("dx_address")

    def _bytes(self, name: str) -> bytes:
        size = c_size_t()
        start = self._call(name, self._handle, byref(size))
        assert isinstance(start, int)
        return ctypes.string_at(start, size.value)

    def num_landed(self, imm: Imm) -> int:
        return int(self._call("dx_num_landed", self._handle, imm))  # type: ignore[call-overload, no-any-return]

    def reset(self, imm: Imm) -> None:
        self._call("dx_reset", self._handle, imm)

    def fence(self, uid: bytes | None, timeout_s: float) -> bool:
        """None: everybody; who lives finds its next write stalled, and dials again."""
        return bool(self._call("dx_fence", self._handle, uid, timeout_s))

    def link(self, target: Location) -> Link:
        """Starts dialling. Raises ClusterError."""
        where = (target.uid, target.base, target.num_pages, target.memory_type, target.lent)
        link = self._call("dx_link", self._handle, *where, target.rkey, len(target.rkey), target.address, len(target.address))
        if link is None:
            raise ClusterError("no memory for a link")
        assert isinstance(link, int)
        return Link(link)

    def await_open(self, link: Link, timeout_s: float) -> str:
        """The lanes of the open link. Raises PeerGone."""
        return self._check("dx_await_open", link, timeout_s)

    def unlink(self, link: Link, patience_s: float, limit_s: float) -> None:
        """Lets writes under way end for `patience_s`, then ends them by force. Raises TransferError: not done within `limit_s`."""
        if not self._call("dx_unlink", link, patience_s, limit_s):
            raise TransferError(f"UCX hangs: its thread has not let go of a link within {limit_s:g} s")

    def write(self, link: Link, source: IdArray, target: IdArray, imm: Imm, stream: int = 0) -> None:
        """Of a pool with a driver, once `stream` has come as far as it is filled now. Raises PeerGone, TransferError; ClusterError: the GPU
        fails."""
        self._check("dx_write", link, source.ctypes.data_as(_PAGES), target.ctypes.data_as(_PAGES), len(source), imm, stream)

    def stop(self, link: Link, imm: Imm, timeout_s: float) -> bool:
        return bool(self._call("dx_stop", link, imm, timeout_s))

    def settled(self, link: Link, imm: Imm) -> bool:
        return bool(self._call("dx_settled", link, imm))

    def busy_s(self, link: Link, imm: Imm) -> float:
        return float(self._call("dx_busy_s", link, imm))  # type: ignore[arg-type]

    def stats(self) -> tuple[int, float]:
        """Pages counted as sent, and the seconds that took."""
        num_pages, busy_s = c_uint64(), c_double()
        self._call("dx_stats", self._handle, byref(num_pages), byref(busy_s))
        return num_pages.value, busy_s.value

    def close(self) -> None:
        self._call("dx_close", self._handle)
        self.release()

    def release(self) -> None:
        self._call("dx_release", self._handle)
