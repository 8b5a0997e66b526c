"""Whichever gateway is asked tells what all of a deployment count."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator

import pytest
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from diptych.cluster.gateway import siblings
from diptych.cluster.gateway.config import GatewayConfig
from diptych.cluster.gateway.metrics import Metrics
from diptych.cluster.gateway.siblings import END, Siblings, joined
from diptych.cluster.places import PlaceKind, PlaceName, gateway_config
from diptych.cluster.spec import parse_spec
from diptych.messages.ids import GatewayId

IDS = tuple(GatewayId(f"gateway-{i}") for i in range(3))


@pytest.fixture
def port():
    """Of nobody else: the sockets' names have it."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def sibling(port: int, index: int) -> Siblings:
    metrics = Metrics(IDS[index])
    metrics.retried("stalled")
    return Siblings(GatewayConfig(IDS[index], "test", "/nowhere", "tiny", port=port, gateways=IDS), metrics.render)


@contextlib.asynccontextmanager
async def open_ones(*ones: Siblings) -> AsyncIterator[None]:
    for each in ones:
        await each.open()
    try:
        yield
    finally:
        for each in ones:
            each.close()


def told(text: bytes, name: str) -> dict[str, float]:
    """Of one series, by gateway. As Prometheus reads it, and no family comes twice."""
    families = list(text_string_to_metric_families(text.decode()))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    return {each.labels["gateway"]: each.value for family in families for each in family.samples if each.name == name}


def run(scenario) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario)


def test_any_tells_of_all(port):
    async def scenario() -> None:
        ones = [sibling(port, i) for i in range(3)]
        async with open_ones(*ones):
            for each in ones:
                text = await each.metrics()
                assert told(text, "diptych_retries_total") == dict.fromkeys(IDS, 1.0)
                assert told(text, "diptych_gateway_scraped") == dict.fromkeys(IDS, 1.0)

    run(scenario())


def test_who_is_not_there_or_hangs_is_left_out(port, monkeypatch):
    monkeypatch.setattr(siblings, "ANSWER_S", 0.05)

    async def scenario() -> None:
        asked = sibling(port, 0)
        async with open_ones(asked):
            with socket.socket(socket.AF_UNIX) as hung:
                hung.bind(f"\0diptych/test@127.0.0.1:{port}/gateway-1")
                hung.listen()
                text = await asked.metrics()
        assert told(text, "diptych_retries_total") == {"gateway-0": 1.0}
        assert told(text, "diptych_gateway_scraped") == {"gateway-0": 1.0, "gateway-1": 0.0, "gateway-2": 0.0}

    run(scenario())


@pytest.mark.parametrize(("said", "whole"), [(b"", False), (b"# HELP x y\n# TYPE x gauge\nx{gate", False), (END, True)])
def test_who_dies_while_it_tells_is_left_out(port, said, whole):
    async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        writer.close()

    async def scenario() -> None:
        asked = sibling(port, 0)
        door = socket.socket(socket.AF_UNIX)
        door.bind(f"\0diptych/test@127.0.0.1:{port}/gateway-1")
        async with await asyncio.start_unix_server(tell, sock=door):
            text = await asked.metrics()
        assert told(text, "diptych_gateway_scraped")["gateway-1"] == float(whole)

    run(scenario())


def test_who_asks_and_does_not_read_is_hung_up_on(port, monkeypatch):
    monkeypatch.setattr(siblings, "ANSWER_S", 0.05)
    much = b"#" * (4 << 20)                   # more than a socket holds by itself
    config = GatewayConfig(IDS[0], "test", "/nowhere", "tiny", port=port, gateways=IDS)

    def come() -> socket.socket:
        asking = socket.socket(socket.AF_UNIX)
        asking.setblocking(False)
        asking.connect(f"\0diptych/test@127.0.0.1:{port}/gateway-0")
        return asking

    async def read_all(asking: socket.socket) -> int:
        loop, count = asyncio.get_running_loop(), 0
        while said := await loop.sock_recv(asking, 1 << 20):
            count += len(said)
        return count

    async def scenario() -> None:
        async with open_ones(Siblings(config, lambda: much)):
            with come() as patient, come() as prompt:
                assert await read_all(prompt) == len(much) + len(END)
                await asyncio.sleep(0.2)
                assert 0 < await read_all(patient) < len(much)

    run(scenario())


def test_another_users_process_is_not_believed(port, monkeypatch):
    async def scenario() -> None:
        asked, other = sibling(port, 0), sibling(port, 1)
        async with open_ones(asked, other):
            assert told(await asked.metrics(), "diptych_gateway_scraped")["gateway-1"] == 1.0
            own = os.geteuid()
            monkeypatch.setattr(os, "geteuid", lambda: own + 1)
            assert told(await asked.metrics(), "diptych_gateway_scraped")["gateway-1"] == 0.0

    run(scenario())


def test_a_name_that_is_taken_stops_nobody(port, caplog):
    async def scenario() -> None:
        first, second = sibling(port, 0), sibling(port, 0)
        async with open_ones(first, second):
            assert "cannot ask gateway-0" in caplog.text
            assert told(await second.metrics(), "diptych_retries_total")["gateway-0"] == 1.0

    run(scenario())


def test_a_family_has_one_head():
    head, other = b"# HELP x of x\n# TYPE x gauge\n", b"# HELP y of y\n# TYPE y gauge\n"
    texts = [head + b'x{gateway="a"} 1.0\n' + other, other + b'y{gateway="b"} 2.0\n' + head + b'x{gateway="b"} 3.0\n']
    assert joined(texts) == head + b'x{gateway="a"} 1.0\nx{gateway="b"} 3.0\n' + other + b'y{gateway="b"} 2.0\n'


def test_each_gateway_is_told_of_all(tmp_path):
    tree = {"name": "x", "model": {"path": "embedded"}, "pools": {"decode": {"workers": 1}}, "router": {"processes": 3}}
    assert gateway_config(parse_spec(tree, tmp_path), PlaceName(PlaceKind.GATEWAY, 1)).gateways == IDS


def test_who_asks_while_another_is_answered_gets_the_same_answer(port):
    async def scenario() -> None:
        num_asked = 0

        def render() -> bytes:
            nonlocal num_asked
            num_asked += 1
            return Metrics(IDS[1]).render()

        asked = sibling(port, 0)
        other = Siblings(GatewayConfig(IDS[1], "test", "/nowhere", "tiny", port=port, gateways=IDS), render)
        async with open_ones(asked, other):
            one, same = await asyncio.gather(asked.metrics(), asked.metrics())
            assert (one == same, num_asked) == (True, 1)
            await asked.metrics()
            assert num_asked == 2

    run(scenario())
