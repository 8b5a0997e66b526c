"""Which UCX is used, with which settings.

    explicit path ─► one that is loaded already ─► the system's ─► the nixl wheel's (InfiniBand, EFA, CUDA) ─► the libucx wheel's (no RDMA)

For GPU memory, of those that are not loaded yet, the first with CUDA: a distribution's rarely has it.
Two copies of UCX never live in one process: both would patch its memory allocation.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from ...messages.errors import ClusterError

PATH_VARIABLE = "DIPTYCH_LIBUCP"
LIBUCP = "libucp.so.0"
LISTING_S = 10.0                # at most, for the dynamic loader's list of libraries

SETTINGS = {
    "MM_ERROR_HANDLING": "y",               # or endpoints that report errors silently lose shared memory, and fall to TCP
    "KEEPALIVE_INTERVAL": "500ms",          # how soon shared memory shows a killed peer
    "TCP_CONN_NB": "y",                     # or a host that does not answer blocks the thread for two minutes
    "TCP_TX_SEG_SIZE": "288k",              # a message of 256 KiB of pages in one piece
    "TCP_RX_SEG_SIZE": "288k",
    "MAX_RMA_RAILS": "2",                   # this and the next: NIXL's choice for RDMA
    "IB_PCI_RELAXED_ORDERING": "try",
    "RC_FENCE": "none",                     # a count leaves after a flush, so no fence is needed
}
"""Each can be overridden by the environment's UCX_ variable of that name."""

LOADING = {"UCX_LOG_LEVEL": "fatal", "UCX_HANDLE_ERRORS": "none", "UCX_ERROR_SIGNALS": ""}
"""Read by UCX while it is loaded: a dead peer is our business to report, and signal handlers are the application's."""


def find_libucp(for_gpu: bool = False) -> str:
    """A path or name for dlopen. Raises ClusterError, naming what was tried."""
    explicit = os.environ.get(PATH_VARIABLE)
    if explicit is not None:
        if not Path(explicit).is_file():
            raise ClusterError(f"{PATH_VARIABLE}={explicit}: there is no such file")
        return explicit
    found = _loaded() or (_with_cuda() if for_gpu else None) or _system() or _nixl_wheel() or _libucx_wheel()
    if found is None:
        tried = f"{PATH_VARIABLE}, the system's libucp.so.0, the wheels nixl-cu13, nixl-cu12 and libucx-cu13, libucx-cu12"
        raise ClusterError(f"no UCX for the transport ucx; tried {tried}: pip install diptych[ucx]")
    return found


def moves_gpu_memory() -> bool:
    """Whether a process that has loaded no UCX yet would find one with CUDA. Loads none. Raises ClusterError, as `find_libucp`."""
    explicit = os.environ.get(PATH_VARIABLE)
    return _has_cuda(Path(explicit)) if explicit is not None else _with_cuda() is not None


def _loaded() -> str | None:
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libucp" in line}
    return min(paths, default=None)


def _with_cuda() -> str | None:
    """Nothing is loaded to find out: it would stay."""
    found = (*_system_paths(), _nixl_wheel(), _libucx_wheel())
    return next((path for path in found if path is not None and _has_cuda(Path(path))), None)


def _has_cuda(library: Path) -> bool:
    """Its modules are beside it, or beside what it is a link to."""
    return any(any(path.parent.glob("ucx/libuct_cuda.so*")) for path in (library, library.resolve()))


def _system() -> str | None:
    try:
        with quiet_loading():
            ctypes.CDLL(LIBUCP, os.RTLD_LOCAL)
    except OSError:
        return None
    return LIBUCP


def _system_paths() -> list[str]:
    """Where the dynamic loader would look for it. Raises ClusterError."""
    folders = [Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    found = [str(folder / LIBUCP) for folder in folders if (folder / LIBUCP).is_file()]
    program = shutil.which("ldconfig", path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")
    if program is None:
        return found
    try:
        listed = subprocess.run([program, "-p"], capture_output=True, text=True, check=False, timeout=LISTING_S).stdout
    except subprocess.TimeoutExpired as slow:
        raise ClusterError(f"{program} -p has listed nothing for {LISTING_S:g} s; {PATH_VARIABLE} can name UCX's library") from slow
    return found + [line.split(" => ")[1] for line in listed.splitlines() if line.strip().startswith(f"{LIBUCP} ") and " => " in line]


def _nixl_wheel() -> str | None:
    for package in ("nixl_cu13", "nixl_cu12"):
        for folder in _folders(package):
            for library in sorted((folder.parent / f"{package}.libs").glob("libucp-*.so*")):
                return str(library)
    return None


def _libucx_wheel() -> str | None:
    libraries = [folder / "lib" / LIBUCP for folder in _folders("libucx")]
    return next((str(library) for library in libraries if library.is_file()), None)


def _folders(package: str) -> list[Path]:
    """Without importing it."""
    spec = find_spec(package)
    return [Path(folder) for folder in spec.submodule_search_locations or ()] if spec is not None else []


@contextmanager
def quiet_loading() -> Iterator[None]:
    """The LOADING variables are set inside, where the environment says nothing."""
    added = {name: value for name, value in LOADING.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def door_settings_text() -> str:
    """The door is reached over TCP, on the devices that UCX_NET_DEVICES names; it may name RDMA's alone (`mlx5_0:1`), then on all."""
    named = os.environ.get("UCX_NET_DEVICES", "all").split(",")
    devices = [name for name in named if Path("/sys/class/net", name).exists()] or ["all"]
    return f"{settings_text()}TLS=tcp\nNET_DEVICES={','.join(devices)}\n"


def settings_text() -> str:
    return "".join(f"{name}={value}\n" for name, value in SETTINGS.items() if f"UCX_{name}" not in os.environ)
