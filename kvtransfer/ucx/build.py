"""The shim's shared library: compiled at first use, into a cache, under the hash of its sources and of the compiler's command."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from ...messages.errors import ClusterError

FOLDER = Path(__file__).parent
FLAGS = ("-std=gnu11", "-D_GNU_SOURCE", "-O2", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden")
TIMEOUT_S = 120.0


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "diptych" / "ucx"


def find_compiler() -> str:
    """Raises ClusterError."""
    candidates = [os.environ.get("CC"), "cc", "gcc", "clang"]
    for candidate in candidates:
        path = shutil.which(candidate) if candidate else None
        if path is not None:
            return path
    raise ClusterError("the transport ucx needs a C compiler once, to build its shim: neither $CC, cc, gcc nor clang was found")


def build_shim() -> Path:
    """Path of the library. Raises ClusterError with the compiler's words."""
    sources = sorted(FOLDER.glob("*.[ch]"))
    key = hashlib.blake2b(repr(FLAGS).encode(), digest_size=12)
    for source in sources:
        key.update(source.name.encode() + b"\0" + source.read_bytes())
    library = cache_folder() / f"shim-{os.uname().machine}-{key.hexdigest()}.so"
    if not library.exists():
        _compile([str(source) for source in sources if source.suffix == ".c"], library)
    return library


def _compile(sources: list[str], library: Path) -> None:
    compiler = find_compiler()
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            output = Path(scratch) / library.name
            command = [compiler, *FLAGS, "-o", str(output), *sources, "-ldl"]
            result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
            if result.returncode != 0:
                raise ClusterError(f"{compiler} could not build the ucx shim (exit {result.returncode}):\n{result.stderr[-2000:]}")
            os.replace(output, library)              # whole or not at all, whoever else compiles it now
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"{compiler} could not build the ucx shim in {library.parent}: {error}") from None
