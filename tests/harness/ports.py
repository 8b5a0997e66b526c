"""A port that somebody else listens on and would share."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def shared_by_a_stranger() -> Iterator[socket.socket]:
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        yield stranger
