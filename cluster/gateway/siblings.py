"""What all gateways of a deployment count, told by whichever is asked: they share one port, and a scrape reaches any of them.

    scrape ──► this gateway ──► each of the others, at a socket of its own ──► own figures and theirs, joined
                                who does not answer within ANSWER_S is left out, and that is told

Gateways stand on one host. Their sockets are abstract Unix ones, named after the deployment and the port that they share: a killed
process leaves nothing.
"""

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterable, Mapping

from ...messages.ids import GatewayId
from .config import GatewayConfig

logger = logging.getLogger(__name__)

ANSWER_S = 1.0
END = b"# EOF\n"                              # without it the teller was killed half-way
SCRAPED = "# HELP diptych_gateway_scraped 1: it has answered, and its series are among these\n# TYPE diptych_gateway_scraped gauge\n"
_CREDENTIALS = struct.Struct("iII")           # pid, uid, gid


class Siblings:
    def __init__(self, config: GatewayConfig, render: Callable[[], bytes]) -> None:
        """`render` tells this gateway's own figures."""
        self._own_id = config.gateway_id
        self._others = tuple(each for each in config.gateways if each != config.gateway_id)
        self._place = f"\0diptych/{config.cluster}@{config.host}:{config.port}/"
        self._render = render
        self._server: asyncio.Server | None = None
        self._question: asyncio.Task[bytes] | None = None

    async def open(self) -> None:
        """From now on the others get an answer. A gateway that cannot give one serves clients all the same."""
        if not self._others:
            return
        door = socket.socket(socket.AF_UNIX)
        try:
            door.bind(self._place + self._own_id)
            door.listen()
        except OSError as error:
            door.close()
            logger.warning("the other gateways cannot ask %s for its metrics: %s", self._own_id, error.strerror or error)
            return
        self._server = await asyncio.start_unix_server(self._tell, sock=door)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def metrics(self) -> bytes:
        """Who asks meanwhile gets the same answer: each question is one to every gateway."""
        if self._question is None or self._question.done():
            self._question = asyncio.create_task(self._all())
        return await asyncio.shield(self._question)

    async def _all(self) -> bytes:
        told = await asyncio.gather(*map(self._ask, self._others))
        texts = dict(zip(self._others, told, strict=True)) | {self._own_id: self._render()}
        return joined(text for _, text in sorted(texts.items()) if text is not None) + _scraped(texts)

    async def _tell(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Who asks and does not read is hung up on: any process of the host may ask."""
        writer.write(self._render() + END)
        writer.close()
        try:
            async with asyncio.timeout(ANSWER_S):
                await writer.wait_closed()
        except OSError:                       # TimeoutError is one
            writer.transport.abort()

    async def _ask(self, other: GatewayId) -> bytes | None:
        """None: no answer, or not in time."""
        try:
            async with asyncio.timeout(ANSWER_S):
                text = await _read(self._place + other)
        except OSError:                       # TimeoutError is one
            return None
        return text.removesuffix(END) if text.endswith(END) else None


def joined(texts: Iterable[bytes]) -> bytes:
    """The format wants all samples of a family together, under one head."""
    families: dict[tuple[bytes, ...], list[bytes]] = {}
    for text in texts:
        for family in (b"\n" + text.rstrip(b"\n")).split(b"\n# HELP ")[1:]:
            what, kind, *samples = family.split(b"\n")
            families.setdefault((what, kind), []).extend(samples)
    return b"".join(b"# HELP " + b"\n".join([*head, *samples, b""]) for head, samples in families.items())


def _scraped(texts: Mapping[GatewayId, bytes | None]) -> bytes:
    lines = [f'diptych_gateway_scraped{{gateway="{each}"}} {float(text is not None)}\n' for each, text in sorted(texts.items())]
    return (SCRAPED + "".join(lines)).encode()


async def _read(name: str) -> bytes:
    """All that the process behind the socket says. Raises OSError."""
    asking = socket.socket(socket.AF_UNIX)
    asking.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(asking, name)
        _check_owner(asking, name)
        reader, writer = await asyncio.open_unix_connection(sock=asking)       # closes it from here on
    except BaseException:
        asking.close()
        raise
    try:
        return await reader.read()
    finally:
        writer.close()


def _check_owner(asking: socket.socket, name: str) -> None:
    """Any process of the host could have taken the name. Raises PermissionError."""
    raw = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    if (owner := _CREDENTIALS.unpack(raw)[1]) != os.geteuid():
        raise PermissionError(f"{name[1:]} is held by user {owner}, not by {os.geteuid()}")
