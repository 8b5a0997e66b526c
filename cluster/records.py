"""Which deployments this user has started from this machine, and the Ray heads that were started for them: one small file each.

They lie in $XDG_STATE_HOME/diptych (by default ~/.local/state/diptych), readable by the user alone. A record says where to look; what
runs, the controller says.
"""

import os
from pathlib import Path

import msgspec
from msgspec import Struct

from ..messages.errors import ClusterError
from .ray_head import Head, stop_head


class Record(Struct, frozen=True):
    name: str
    address: str                              # of the Ray cluster
    head: Head | None                         # set if it is ours, and so ours to stop
    endpoint: str | None = None               # once it has served


def folder() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "diptych"


def write(record: Record) -> None:
    folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = folder() / f".{record.name}.{os.getpid()}"
    partial.touch(mode=0o600)
    partial.write_bytes(msgspec.json.encode(record))
    partial.replace(_path(record.name))


def remove(name: str) -> None:
    _path(name).unlink(missing_ok=True)


def read_all() -> list[Record]:
    """Records whose Ray head has died are removed, and what is left of it. Raises ClusterError."""
    records = [_read(path) for path in sorted(folder().glob("*.json"))]
    for record in records:
        if record.head is not None and not record.head.is_alive:
            stop_head(record.head)
            remove(record.name)
    return [record for record in records if record.head is None or record.head.is_alive]


def find(name: str | None) -> Record | None:
    """By its name; without one, the only one there is. Raises ClusterError if there are several."""
    records = read_all()
    if name is None and len(records) > 1:
        raise ClusterError(f"which deployment? {', '.join(record.name for record in records)}")
    return next((record for record in records if name in (None, record.name)), None)


def _path(name: str) -> Path:
    return folder() / f"{name}.json"


def _read(path: Path) -> Record:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except (OSError, msgspec.DecodeError) as error:
        raise ClusterError(f"{path}: no record of a deployment: {error}") from None
