"""How many connections the limit of open files allows: each is a file, and a gateway that has none left can accept nobody."""

import logging
import resource

from ...messages.errors import ClusterError
from .http_server import SPARE

OWN_FILES = 256
"""Of the gateway's process itself: Ray's, ZeroMQ's, logs, libraries."""

HEADROOM = 16 * OWN_FILES
"""As far as it costs nothing: each worker takes three or four."""

logger = logging.getLogger(__name__)


def raise_file_limit(num_connections: int) -> int:
    """Of this process, as far as it must and may; returns what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, num_connections + SPARE + HEADROOM)
    if wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted)


def connections_within(asked: int, num_files: int) -> int:
    """At most `asked`. Raises ClusterError if there is none."""
    room = num_files - SPARE - OWN_FILES
    if room < 1:
        raise ClusterError(f"a limit of {num_files} open files leaves none for clients: {SPARE + OWN_FILES + 1} are needed (ulimit -n)")
    if room < asked:
        logger.warning("%d connections at a time, not %d: this process may open %d files (ulimit -n)", room, asked, num_files)
    return min(asked, room)
