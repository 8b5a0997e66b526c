"""The real server and the real Post, with a scripted decode worker in a thread; the official client asks."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from harness.gateway import EOS, MODEL, make_model, tokens_of

from diptych.cluster.gateway.config import GatewayConfig, Limits
from diptych.cluster.gateway.server import Gateway
from diptych.messages.errors import ClusterError
from diptych.messages.ids import Epoch, GatewayId, WorkerId
from diptych.messages.membership import Member, Membership, Role
from diptych.messages.requests import Abort, FinishReason, GenerateRequest, LoadReport, LoadUpdate, StepTokens, TokenDelta, WorkerRef
from diptych.messages.zmq_post import Keyring, ZmqPost

OURS = '{gateway="gateway-0"}'
ANSWER = [*tokens_of("Grüße, 世界 🙂"), EOS]


class ScriptedWorker(threading.Thread):
    """Answers every request with ANSWER, one token each STEP_S; endlessly if asked to ignore EOS."""

    STEP_S = 0.001

    def __init__(self, keyring: Keyring) -> None:
        super().__init__(daemon=True)
        self.post = ZmqPost(keyring)
        self.ref = WorkerRef(WorkerId("decode-0"), Epoch(1), self.post.address)
        self.running: dict[str, tuple[GenerateRequest, int]] = {}
        self.aborted: set[str] = set()
        self.gateways: set[str] = set()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            for message in self.post.receive(self.STEP_S):
                if isinstance(message, GenerateRequest):
                    self.running[message.request_id] = (message, 0)
                    self.gateways.add(message.gateway)
                elif isinstance(message, Abort):
                    self.running.pop(message.request_id, None)
                    self.aborted.add(message.request_id)
            for request, index in list(self.running.values()):
                self._step(request, index)
            for gateway in self.gateways:
                self.post.send(gateway, LoadUpdate(LoadReport(self.ref, 0, 0, len(self.running), 0, 64, 64, 16)))
        self.post.close()

    def _step(self, request: GenerateRequest, index: int) -> None:
        token = ANSWER[index % (len(ANSWER) - 1)] if request.sampling.ignore_eos else ANSWER[index]
        stop = token in request.sampling.stop_token_ids
        finish = FinishReason.STOP if stop else FinishReason.LENGTH if index + 1 == request.sampling.max_tokens else None
        self.post.send(request.gateway, StepTokens(self.ref, (TokenDelta(request.request_id, index, (token,), finish),)))
        if finish is None:
            self.running[request.request_id] = (request, index + 1)
        else:
            del self.running[request.request_id]

    @property
    def membership(self) -> Membership:
        return Membership(1, (Member(self.ref, Role.DECODE, "layout", 16, 64, 4096),), ())


@contextlib.contextmanager
def serving(folder: Path, name: str = "gateway-0", **options: object) -> Iterator[tuple[Gateway, ScriptedWorker, str]]:
    keyring = Keyring.new()
    worker = ScriptedWorker(keyring)
    post = ZmqPost(keyring)
    gateway = Gateway(GatewayConfig(GatewayId(name), "test", str(make_model(folder)), MODEL, **options), post)
    thread = threading.Thread(target=gateway.run)
    worker.gateways.add(post.address)
    worker.start()
    thread.start()
    try:
        url = f"http://127.0.0.1:{gateway.port}"
        gateway.update_membership(worker.membership)
        wait_for(lambda: answers(url))
        yield gateway, worker, url
    finally:
        gateway.stop()
        thread.join(20)
        worker.over.set()
        worker.join(20)
        post.close()
    assert not thread.is_alive()


def answers(url: str) -> bool:
    try:
        return httpx.get(url + "/ready").status_code == 200
    except httpx.TransportError:
        return False


def wait_for(condition, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("model")) as parts:
        yield parts


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=served[2] + "/v1", api_key="none", max_retries=0, timeout=20) as made:
        yield made


def test_chat(client):
    reply = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hallo"}])
    assert reply.choices[0].message.content == "Grüße, 世界 🙂"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.prompt_tokens == len("Hallo") + 2
    assert reply.usage.completion_tokens == len(ANSWER)
    assert reply._request_id


def test_chat_streamed(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hallo"}], stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Grüße, 世界 🙂"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert (last.choices, last.usage.completion_tokens) == ([], len(ANSWER))


def test_completions_streamed_and_not(client):
    whole = client.completions.create(model=MODEL, prompt="Hallo", max_tokens=4)
    chunks = list(client.completions.create(model=MODEL, prompt="Hallo", max_tokens=4, stream=True))
    assert whole.choices[0].text == "".join(chunk.choices[0].text for chunk in chunks) == "Grü"
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "length"


def test_models_and_errors(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=MODEL, prompt="x", temperature=-1)
    assert bad.value.param == "temperature"


def test_concurrent_streams_do_not_mix(client):
    texts: list[str] = []

    def ask(max_tokens: int) -> None:
        chunks = client.completions.create(model=MODEL, prompt="x", max_tokens=max_tokens, stream=True, extra_body={"ignore_eos": True})
        texts.append("".join(chunk.choices[0].text for chunk in chunks))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(30, 62)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    expected = [bytes(ANSWER[:-1] * 4)[:n].decode(errors="replace") for n in range(30, 62)]
    assert sorted(texts) == sorted(expected)


def test_leaving_aborts(served, client):
    _, worker, _ = served
    stream = client.completions.create(model=MODEL, prompt="x", max_tokens=4000, stream=True, extra_body={"ignore_eos": True})
    next(stream)
    before = set(worker.aborted)
    stream.close()
    wait_for(lambda: worker.aborted - before and not worker.running)


def test_status_is_exact(served, client):
    gateway, _, _ = served
    before = gateway.status()
    client.completions.create(model=MODEL, prompt="Hallo", max_tokens=4)
    after = gateway.status()
    assert after.outcomes["finished"] == before.outcomes["finished"] + 1
    assert after.num_output_tokens == before.num_output_tokens + 4
    assert after.ready
    assert after.ttft is not None
    assert after.ttft.p50_s <= after.ttft.p90_s
    assert [load.worker.worker_id for load in after.loads] == ["decode-0"]


def test_tokens_are_not_delayed_by_nagle(served):
    """Without TCP_NODELAY a second small write waits up to 40 ms for the first one's acknowledgement."""
    _, _, url = served
    body = {"model": MODEL, "prompt": "x", "max_tokens": 8, "stream": True, "ignore_eos": True}
    with httpx.Client(base_url=url) as http:
        took = []
        for _ in range(5):
            start = time.perf_counter()
            http.post("/v1/completions", json=body).raise_for_status()
            took.append(time.perf_counter() - start)
    assert min(took) < 0.040


def test_too_large_a_body_is_refused_while_it_is_read(served):
    _, _, url = served

    def chunks():
        for _ in range(200):
            yield b" " * (1 << 16)

    reply = httpx.post(url + "/v1/completions", content=chunks(), timeout=20)
    assert reply.status_code == 413
    assert str(8 << 20) in reply.json()["error"]["message"]


def test_stop_lets_an_open_stream_end(tmp_path):
    with serving(tmp_path, limits=Limits(grace_s=10.0)) as (gateway, worker, url):
        body = {"model": MODEL, "prompt": "x", "max_tokens": 150, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=20) as reply:
            lines = reply.iter_lines()
            next(lines)
            gateway.stop()
            rest = list(lines)
        assert "data: [DONE]" in rest
        assert not worker.aborted


def test_stop_ends_what_takes_too_long(tmp_path):
    with serving(tmp_path, limits=Limits(grace_s=1.0)) as (gateway, worker, url):
        body = {"model": MODEL, "prompt": "x", "max_tokens": 4000, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=20) as reply:
            lines = reply.iter_lines()
            next(lines)
            gateway.stop()
            with pytest.raises(httpx.RemoteProtocolError):
                assert "data: [DONE]" not in list(lines)
        wait_for(lambda: worker.aborted)


def test_stop_closes_what_is_idle(tmp_path):
    with serving(tmp_path) as (gateway, _, _), socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as idle:
        idle.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        assert idle.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
        gateway.stop()
        assert idle.recv(1 << 16) == b""


def test_two_gateways_share_a_port(tmp_path):
    keyring = Keyring.new()
    posts = [ZmqPost(keyring), ZmqPost(keyring)]
    config = GatewayConfig(GatewayId("gateway-0"), "test", str(make_model(tmp_path)), MODEL, reuse_port=True)
    first = Gateway(config, posts[0])
    port = first.port
    second = Gateway(GatewayConfig(GatewayId("gateway-1"), "test", config.model_path, MODEL, port=port, reuse_port=True), posts[1])
    assert second.port == port
    with pytest.raises(ClusterError, match=str(port)):
        Gateway(GatewayConfig(GatewayId("gateway-2"), "test", config.model_path, MODEL, port=port), posts[1])
    for gateway, post in ((first, posts[0]), (second, posts[1])):
        gateway.close()
        post.close()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))


def test_a_scrape_of_one_gateway_tells_of_both(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = {"port": port, "reuse_port": True, "gateways": (GatewayId("gateway-0"), GatewayId("gateway-1"))}
    with serving(tmp_path / "0", **both) as (_, _, url), serving(tmp_path / "1", "gateway-1", **both):
        for _ in range(4):
            lines = httpx.get(url + "/metrics", timeout=20).text.splitlines()
            assert {f'diptych_gateway_scraped{{gateway="gateway-{i}"}} 1.0' for i in range(2)} <= set(lines)
            assert sum(line.startswith("diptych_workers_alive{") for line in lines) == 2


def test_a_full_gateway_says_so_and_that_it_lives(tmp_path):
    with serving(tmp_path, limits=Limits(max_connections=1)) as (gateway, _, url):
        with contextlib.closing(the_only_one(gateway.port)):
            reply = httpx.post(url + "/v1/completions", json={"model": MODEL, "prompt": "x"}, timeout=20)
            assert (reply.status_code, reply.headers["retry-after"], reply.headers["connection"]) == (503, "1", "close")
            assert reply.json()["error"]["code"] == "too_many_connections"
            assert httpx.get(url + "/health", timeout=20).status_code == 200
            names = ["http_connections_max", "http_turned_away_total"]
            assert [metric(url, name) for name in names] == [1, 1]
            assert metric(url, "http_connections") >= 2
        wait_for(lambda: httpx.post(url + "/v1/completions", json={"model": MODEL, "prompt": "x"}, timeout=20).status_code == 200)


def the_only_one(port: int) -> socket.socket:
    """A connection within the limit of one; earlier clients' may not be gone yet."""
    while True:
        made = socket.create_connection(("127.0.0.1", port), timeout=20)
        made.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        answer = made.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        if b"connection: close" not in answer:
            return made
        made.close()


def metric(url: str, name: str) -> float:
    lines = httpx.get(url + "/metrics", timeout=20).text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"diptych_{name}{OURS} "))
