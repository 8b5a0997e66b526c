"""`diptych bench gateway`: gateway processes on one port, real sockets on both sides, a stub engine behind them.

    client (this process) ──HTTP──► N gateways, one port ──ZeroMQ──► stub engine, one process

    first    one token a request, so many connections that always ask      requests/s
    short    SHORT tokens a request, the same                              requests/s
    streams  one long answer on every connection                           tokens/s
    latency  SHORT tokens a request, Poisson, LOAD of `short` or `rate`    ms from the request to its first token and to its end

All of it is overhead: the engine's first token takes no time. Figures per core are per second of CPU that the gateways used, so that client
and engine, which share the machine, do not count; latencies they do distort where cores are scarce.
"""

import asyncio
import json
import multiprocessing
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import uvloop
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from ...messages.errors import ClusterError, DiptychError
from ...messages.ids import Address, GatewayId
from ...messages.membership import Membership
from ...messages.zmq_post import Keyring, ZmqPost
from ..gateway.config import GatewayConfig
from ..gateway.server import Gateway
from .client import Address as HttpAddress
from .client import HttpClient
from .stub_engine import StubEngine, serve

SHORT = 16
LOAD = 0.6
READY_S = 30.0
MODEL_NAME = "stub"
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class GatewayBench:
    model: Path                               # folder with a tokenizer
    gateways: int
    connections: int
    seconds: float                            # of each phase
    stream_tokens: int
    step_ms: float
    prompt_words: int
    policy: str
    rate: float | None = None                 # of `latency`, requests/s; None: LOAD of what `short` did


class Phase(Struct, frozen=True):
    name: str
    seconds: float
    requests: int
    tokens: int
    gateway_cpu_s: float                      # of all gateway processes
    ttft_ms: tuple[float, float]              # p50, p99
    e2e_ms: tuple[float, float]

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.seconds

    @property
    def requests_per_core(self) -> float:
        return self.requests / self.gateway_cpu_s

    @property
    def tokens_per_core(self) -> float:
        return self.tokens / self.gateway_cpu_s


@dataclass(slots=True)
class Sink:
    """One streamed answer, as little looked at as can be."""

    began: float
    first: float | None = None
    num_bytes: int = 0
    tail: bytes = b""

    def receive(self, status: int, body: bytes) -> None:
        if status != 200:
            raise ClusterError(f"the gateway answered {status}: {body[:200]!r}")
        if body:
            self.first = time.perf_counter() if self.first is None else self.first
            self.num_bytes += len(body)
            self.tail = body[-len(DONE) :]


@dataclass
class Tally:
    requests: int = 0
    tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    e2e_s: list[float] = field(default_factory=list)


class Caller:
    def __init__(self, bench: GatewayBench, port: int) -> None:
        self._bench = bench
        self._address = HttpAddress("127.0.0.1", port, tls=False, prefix="")
        self._client = HttpClient(self._address)
        self._tally = Tally()

    async def ready(self, num_gateways: int) -> None:
        """A connection lands on any of the gateways: each request below must have been answered."""
        for _ in range(8 * num_gateways):
            await self._ask(self._request(1), 1)
        self._client.close()

    async def closed(self, max_tokens: int, seconds: float) -> Tally:
        """Every connection asks again as soon as it has its answer; what is under way at the end is finished."""
        tally, raw, end = self._begin(), self._request(max_tokens), time.perf_counter() + seconds

        async def ask_on() -> None:
            while time.perf_counter() < end:
                await self._ask(raw, max_tokens)

        await asyncio.gather(*(ask_on() for _ in range(self._bench.connections)))
        return tally

    async def open(self, max_tokens: int, rate: float, seconds: float) -> Tally:
        tally, raw, draw = self._begin(), self._request(max_tokens), random.Random(0)
        tasks, at, end = [], time.perf_counter(), time.perf_counter() + seconds
        while (at := at + draw.expovariate(rate)) < end:
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            tasks.append(asyncio.create_task(self._ask(raw, max_tokens)))
        await asyncio.gather(*tasks)
        return tally

    def _begin(self) -> Tally:
        self._tally = Tally()
        return self._tally

    def _request(self, max_tokens: int) -> bytes:
        return completion(self._address, self._bench.prompt_words, max_tokens)

    async def _ask(self, raw: bytes, max_tokens: int) -> None:
        sink = Sink(time.perf_counter())
        await self._client.exchange(raw, sink)
        ended = time.perf_counter()
        if sink.first is None or sink.tail != DONE:
            raise ClusterError(f"an answer of {sink.num_bytes} bytes ended without [DONE]")
        tally = self._tally
        tally.requests += 1
        tally.tokens += max_tokens
        tally.ttft_s.append(sink.first - sink.began)
        tally.e2e_s.append(ended - sink.began)


def completion(address: HttpAddress, prompt_words: int, max_tokens: int) -> bytes:
    """The request, as bytes."""
    prompt = " ".join(f"word{i}" for i in range(prompt_words))
    body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    return address.request("POST", "/v1/completions", json.dumps(body).encode())


def run_gateway_bench(bench: GatewayBench, console: Console) -> list[Phase]:
    """Raises ClusterError, ModelError."""
    with _plant(bench) as (port, processes), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        phases = runner.run(_phases(Caller(bench, port), bench, processes))
    console.print(_table(bench, phases))
    return phases


async def _phases(caller: Caller, bench: GatewayBench, processes: list[psutil.Process]) -> list[Phase]:
    await caller.ready(len(processes))
    phases: list[Phase] = []

    async def phase(name: str, load: Coroutine[None, None, Tally]) -> None:
        before, began = _cpu_s(processes), time.perf_counter()
        tally = await load
        seconds = time.perf_counter() - began
        phases.append(_summary(name, tally, seconds, _cpu_s(processes) - before))

    await phase("first", caller.closed(1, bench.seconds))
    await phase("short", caller.closed(SHORT, bench.seconds))
    rate = bench.rate or LOAD * phases[-1].requests_per_s
    await phase("streams", caller.closed(bench.stream_tokens, bench.seconds))
    await phase("latency", caller.open(SHORT, rate, bench.seconds))
    return phases


def _summary(name: str, tally: Tally, seconds: float, cpu_s: float) -> Phase:
    return Phase(name, seconds, tally.requests, tally.tokens, cpu_s, _p50_p99_ms(tally.ttft_s), _p50_p99_ms(tally.e2e_s))


def _p50_p99_ms(seconds: list[float]) -> tuple[float, float]:
    ordered = sorted(seconds)
    p50, p99 = (ordered[int(share * (len(ordered) - 1))] * 1e3 for share in (0.5, 0.99))
    return p50, p99


def _cpu_s(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def _table(bench: GatewayBench, phases: list[Phase]) -> Table:
    table = Table(title=f"{bench.gateways} gateway(s), {bench.connections} connections, steps of {bench.step_ms:g} ms")
    per_core = ("requests/s/core", "tokens/s/core")
    for column in ("phase", "requests/s", "tokens/s", "gateway cores", *per_core, "TTFT p50/p99 ms", "E2E p50/p99 ms"):
        table.add_column(column, justify="right")
    for each in phases:
        rates = (each.requests_per_s, each.tokens / each.seconds)
        of_cores = (each.requests_per_core, each.tokens_per_core)
        times = (f"{p50:.2f} / {p99:.2f}" for p50, p99 in (each.ttft_ms, each.e2e_ms))
        cores = f"{each.gateway_cpu_s / each.seconds:.2f}"
        table.add_row(each.name, *(f"{rate:.0f}" for rate in rates), cores, *(f"{rate:.0f}" for rate in of_cores), *times)
    return table


# the processes


@contextmanager
def _plant(bench: GatewayBench) -> Iterator[tuple[int, list[psutil.Process]]]:
    """The port, and the gateways' processes. All end with the block."""
    spawn, keyring = multiprocessing.get_context("spawn"), Keyring.new()
    children: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def start(target: Callable[..., None], *args: object) -> Connection:
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=target, args=(theirs, keyring, *args), daemon=True)
        process.start()
        children.append((process, ours))
        return ours

    try:
        port, gateways = 0, {}
        for number in range(bench.gateways):
            pipe = start(_gateway_process, bench, number, port)
            gateways[pipe], port = _hear(pipe)
        addresses = tuple(gateways.values())
        engine = start(_engine_process, addresses, bench.step_ms / 1e3)
        membership = Membership(1, (_hear(engine),), addresses)
        for pipe in gateways:
            pipe.send(membership)
            _hear(pipe)
        yield port, [psutil.Process(process.pid) for process, _ in children[: bench.gateways]]
    finally:
        for process, _ in children:
            process.terminate()
            process.join()


def _hear(pipe: Connection) -> Any:
    """What the process at the other end says; raises what it failed with."""
    try:
        heard = pipe.recv() if pipe.poll(READY_S) else None
    except EOFError:
        heard = None
    if isinstance(heard, DiptychError):
        raise heard
    if heard is None:
        raise ClusterError(f"a process of the bench has died, or has said nothing for {READY_S:g} s")
    return heard


def _gateway_process(pipe: Connection, keyring: Keyring, bench: GatewayBench, number: int, port: int) -> None:
    post, name = ZmqPost(keyring), GatewayId(f"gateway-{number}")
    config = GatewayConfig(name, "bench", str(bench.model), MODEL_NAME, policy=bench.policy, port=port, reuse_port=True)
    try:
        gateway = Gateway(config, post)
    except DiptychError as error:
        pipe.send(error)
        return
    pipe.send((post.address, gateway.port))

    def join() -> None:
        gateway.update_membership(pipe.recv())
        pipe.send(True)

    threading.Thread(target=join, daemon=True).start()
    gateway.run()


def _engine_process(pipe: Connection, keyring: Keyring, gateways: tuple[Address, ...], step_s: float) -> None:
    post = ZmqPost(keyring)
    engine = StubEngine(post, gateways)
    pipe.send(engine.member)
    serve(engine, post, step_s)
