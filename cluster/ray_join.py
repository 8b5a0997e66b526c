"""Which Ray a command uses, and joining it, or saying within seconds why not.

    running_ray() ──► an address that somebody listens at, or none ──► join(record)
"""

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..messages.errors import ClusterError
from . import records
from .own_name import own_name
from .processes import held_signals
from .ray_head import Head
from .records import Record

CONNECT_TIMEOUT_S = 2.0
JOIN_LIMITS = {"RAY_NUM_REDIS_GET_RETRIES": "2", "RAY_gcs_rpc_server_connect_timeout_s": "1", "RAY_py_gcs_connect_timeout_s": "2"}
"""Ray's own, for connecting alone: 10 s for a head that listens and does not answer, where it tries for minutes, then ends the process."""


def running_ray() -> tuple[str | None, Head | None]:
    """RAY_ADDRESS; or a head that an earlier deployment started; or what `ray start` has noted on this machine."""
    if address := os.environ.get("RAY_ADDRESS"):
        if not is_host_and_port(address):
            raise ClusterError(f"RAY_ADDRESS={address}: host:port is wanted, of a Ray head")
        if not accepts(address):
            raise ClusterError(f"RAY_ADDRESS={address}: nothing listens there")
        return address, None
    for record in records.read_all():
        if record.head is not None and record.address:
            return record.address, record.head
    note = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "ray_current_cluster"
    address = note.read_text().strip() if note.is_file() else ""
    return (address, None) if address and accepts(address) else (None, None)


def is_host_and_port(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return bool(host) and "/" not in host and port.isdecimal()


def accepts(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S):
            return True
    except (OSError, ValueError):
        return False


def join(record: Record) -> None:
    if not record.address:
        raise ClusterError(f"Ray's head of {record.name} is starting, or its `up` was cut off; `{own_name()} down {record.name}` stops it")
    _set_environment(record)
    import ray

    from .ray_runtime import NAMESPACE

    if ray.is_initialized():
        if ray.get_runtime_context().gcs_address != record.address:
            raise ClusterError(f"this process is connected to Ray at {ray.get_runtime_context().gcs_address}, not {record.address}")
        return
    if not accepts(record.address):
        hint = "" if record.head else f"; if it is gone for good, `{own_name()} down {record.name}` forgets the deployment"
        raise ClusterError(f"cannot join Ray at {record.address}: nothing listens there, asked for {CONNECT_TIMEOUT_S:g} s{hint}")
    began = time.monotonic()
    try:
        with _own_sigterm():
            ray.init(address=record.address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"cannot join Ray at {record.address}, tried for {time.monotonic() - began:.0f} s: {error}") from None


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keeps a command's handler: Ray puts its own in place, which print a trace and abort. A signal that comes meanwhile waits."""
    handler = signal.getsignal(signal.SIGTERM)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    with held_signals():
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, handler)


def _set_environment(record: Record) -> None:
    """Read by Ray when it is imported."""
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", **JOIN_LIMITS}.items():
        os.environ.setdefault(name, value)
    if record.head is not None:
        os.environ.pop("RAY_AUTH_TOKEN", None)                # another Ray's, which Ray prefers to a token's path
        os.environ.update(record.head.environment)


def leave() -> None:
    """Nothing to be done if Ray has not even been imported."""
    if (ray := sys.modules.get("ray")) is not None:
        ray.shutdown()
