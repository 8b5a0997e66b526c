"""Client and open loop against the stub server."""

import asyncio
import time

import pytest

from diptych.cluster.bench.client import Address, HttpClient
from diptych.cluster.bench.endpoint import ModelCard, find_model
from diptych.cluster.bench.errors import EndpointError
from diptych.cluster.bench.load import LoadRun, replay
from diptych.cluster.bench.record import Outcome, RequestRecord
from diptych.cluster.bench.workload import TimedRequest, Workload
from diptych.cluster.bench.writer import PromptSource, RequestWriter

CARD = ModelCard("stub", 4096, 1000)


def run_load(url: str, workload: Workload, deadline_s: float = 10.0, api_key: str | None = None) -> LoadRun:
    async def load() -> LoadRun:
        client = HttpClient(Address.parse(url, api_key))
        raw_requests = RequestWriter(client.address, CARD, PromptSource()).write(workload, salt=0)
        try:
            return await replay(client, workload, raw_requests, deadline_s, lambda record: None)
        finally:
            client.close()

    return asyncio.run(load())


def one(url: str, *, deadline_s: float = 10.0, tokens: int = 4) -> RequestRecord:
    (record,) = run_load(url, Workload("one", (TimedRequest(0, 8, tokens),)), deadline_s).records
    return record


def evenly(count: int, gap_s: float, tokens: int = 3) -> Workload:
    return Workload("even", tuple(TimedRequest(index * gap_s, 8, tokens) for index in range(count)))


def test_known_delays_are_measured(stub, behaviour) -> None:
    stub.behave = lambda index: behaviour(ttft_s=0.15, tpot_s=0.05)
    record = one(stub.url)
    assert record.outcome is Outcome.OK
    assert record.ttft_s >= 0.15                                    # never early; late by what a shared machine adds
    assert 0.15 + 3 * 0.05 <= record.ttft_s + 3 * record.tpot_s <= record.e2e_s
    assert record.tpot_s > 0
    assert len(record.chunks) == record.output_tokens == 4
    assert record.prompt_tokens_seen == len(stub.bodies[0]["prompt"]) == 8
    assert record.cached_tokens == 4


def test_open_loop_does_not_wait_for_answers(stub, behaviour) -> None:
    stub.behave = lambda index: behaviour(ttft_s=0.4)
    run = run_load(stub.url, evenly(8, 0.01))
    assert max(record.sent_s for record in run.records) < min(record.ended_s for record in run.records)
    assert [record.scheduled_s for record in run.records] == pytest.approx([index * 0.01 for index in range(8)])
    assert all(record.lag_s >= 0 for record in run.records)
    assert stub.num_connections == 8


def test_connections_are_kept_alive(stub) -> None:
    run = run_load(stub.url, evenly(5, 0.25))
    assert {record.outcome for record in run.records} == {Outcome.OK}
    assert stub.num_connections == 1


def test_a_connection_closed_while_idle_is_replaced(stub, behaviour) -> None:
    stub.behave = lambda index: behaviour(close=True)
    run = run_load(stub.url, evenly(5, 0.05))
    assert {record.outcome for record in run.records} == {Outcome.OK}
    assert stub.num_connections == 5


@pytest.mark.parametrize(
    ("how", "outcome", "tokens"),
    [
        ({"status": 429}, Outcome.REFUSED, 0),
        ({"status": 500}, Outcome.HTTP_ERROR, 0),
        ({"drop_after": 2}, Outcome.INCOMPLETE, 2),
        ({"error_after": 2}, Outcome.STREAM_ERROR, None),
        ({"not_http": True}, Outcome.MALFORMED, 0),
        ({"tokens": 0}, Outcome.INCOMPLETE, 0),
        ({"finish": False}, Outcome.INCOMPLETE, 4),
        ({"hang_after": 1}, Outcome.TIMEOUT, 1),
        ({"with_usage": False}, Outcome.OK, 4),
        ({"per_chunk": 2}, Outcome.OK, 4),
    ],
)
def test_what_servers_do(stub, behaviour, how: dict[str, object], outcome: Outcome, tokens: int | None) -> None:
    stub.behave = lambda index: behaviour(**how)
    record = one(stub.url, deadline_s=0.5 if "hang_after" in how else 10.0)
    assert record.outcome is outcome, record.error
    assert tokens in (None, record.output_tokens)
    assert record.error or outcome is Outcome.OK


def test_a_request_past_its_deadline_is_hung_up(stub, behaviour) -> None:
    stub.behave = lambda index: behaviour(hang_after=1)
    began = time.monotonic()
    assert one(stub.url, deadline_s=0.3).error == "not finished after 0.3 s"
    assert time.monotonic() - began < 5
    assert stub.disconnected.wait(timeout=5), "the server still holds the connection"


def test_failures_leave_the_others_alone(stub, behaviour) -> None:
    stub.behave = lambda index: behaviour(drop_after=1) if index % 3 == 0 else behaviour(status=429) if index % 3 == 1 else behaviour()
    outcomes = [record.outcome for record in run_load(stub.url, evenly(9, 0.03)).records]
    assert sorted(outcome.value for outcome in outcomes) == ["incomplete"] * 3 + ["ok"] * 3 + ["refused"] * 3


def test_nobody_there(stub) -> None:
    async def unused_port() -> int:
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        return port

    url = f"http://127.0.0.1:{asyncio.run(unused_port())}"
    record = one(url)
    assert (record.outcome, record.status) == (Outcome.UNREACHABLE, None)
    with pytest.raises(EndpointError, match="does not answer"):
        asyncio.run(find_model(HttpClient(Address.parse(url)), None))


def test_api_key_is_sent(stub) -> None:
    run_load(stub.url, evenly(1, 0), api_key="sk-1")
    assert stub.headers[-1]["authorization"] == "Bearer sk-1"


def test_cancelling_hands_back_what_is_known(stub, behaviour) -> None:
    stub.behave = lambda index: behaviour(hang_after=1) if index == 0 else behaviour()
    workload = Workload("w", (TimedRequest(0, 8, 3), TimedRequest(0.1, 8, 3), TimedRequest(60, 8, 3)))
    answered = asyncio.Event()

    async def load() -> LoadRun:
        client = HttpClient(Address.parse(stub.url))
        raw_requests = RequestWriter(client.address, CARD, PromptSource()).write(workload, salt=0)
        task = asyncio.create_task(replay(client, workload, raw_requests, 30, lambda record: answered.set()))
        async with asyncio.timeout(10):
            await answered.wait()
        task.cancel()
        return await task

    run = asyncio.run(load())
    assert run.interrupted
    assert run.planned == 3
    assert [record.outcome for record in run.records] == [Outcome.CANCELLED, Outcome.OK]


def find(stub, wanted: str | None = None) -> ModelCard:
    return asyncio.run(find_model(HttpClient(Address.parse(stub.url)), wanted))


def test_discovery(stub) -> None:
    assert find(stub) == find(stub, "stub") == CARD
    with pytest.raises(EndpointError, match=r"serves \['stub'\], not 'other'"):
        find(stub, "other")
    stub.card = {"name": "no id"}
    with pytest.raises(EndpointError, match="something else than a list of models"):
        find(stub)
    stub.models_status = 401
    with pytest.raises(EndpointError, match="HTTP 401"):
        find(stub, "stub")
    stub.models_status = 404
    assert find(stub, "mine") == ModelCard("mine")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://host:8000", "http://host:8000"),
        ("http://host:8000/v1/", "http://host:8000"),
        ("https://host/deploy/v1", "https://host:443/deploy"),
        ("http://[::1]:80", "http://[::1]:80"),
    ],
)
def test_addresses(url: str, told: str) -> None:
    assert str(Address.parse(url)) == told


@pytest.mark.parametrize(
    "url",
    [
        "host:8000", "ftp://host", "http://", "http://host:port", "http://host:99999", "http://host?x=1", "http://[::1", "http://a..b",
        f"http://{'a' * 64}", "http://a b", "http://a\nb", "http://host/\udcff", "http://user:word@host",
    ],
)  # fmt: skip
def test_bad_addresses(url: str) -> None:
    with pytest.raises(EndpointError):
        Address.parse(url)


def test_an_api_key_cannot_smuggle_a_header() -> None:
    with pytest.raises(EndpointError, match="API key"):
        Address.parse("http://host", "key\r\nX-Other: 1")
