"""What a gateway's own code costs without sockets and processes, in µs of CPU: `PYTHONPATH=tests python tests/bench/gateway_cost.py`.

    request   its bytes → GenerateRequest on the wire, of which tokenizing and deciding
    answer    one token that is the first and the last: message → bytes
    token     one of a stream, 128 of them in a message: message → bytes

The least of ROUNDS rounds of 128 requests, and a low step of all (the least have a token without a text, which nobody is sent): what a
neighbour disturbs is left out, and so are cold caches.
"""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop
from harness.http_bytes import Socket

import diptych.models.embedded
from diptych.cluster.bench.client import Address as HttpAddress
from diptych.cluster.bench.gateway_bench import MODEL_NAME, completion
from diptych.cluster.bench.stub_engine import StubEngine
from diptych.cluster.gateway.app import App
from diptych.cluster.gateway.config import GatewayConfig
from diptych.cluster.gateway.connection import Connection
from diptych.cluster.gateway.core import Core
from diptych.messages.codec import Message, decode, encode
from diptych.messages.ids import Address, GatewayId
from diptych.messages.membership import Membership

MODEL = Path(diptych.models.embedded.__path__[0]) / "pydoc-llama"
NUM_CONNECTIONS, ROUNDS, NUM_STEPS, PROMPT_WORDS = 128, 50, 500, 30


class Wire:
    """A Post whose frames lie in the other's inbox."""

    num_dropped = 0

    def __init__(self, address: str) -> None:
        self.address, self.inbox, self.other = Address(address), [], self

    def send(self, to: Address, message: Message) -> None:
        self.other.inbox.append(encode(message))

    def update_members(self, members: set[Address]) -> None:
        pass

    def receive(self, timeout_s: float) -> list[Message]:
        frames, self.inbox = self.inbox, []
        return [decode(frame) for frame in frames]


class Sink(Socket):
    def write(self, data: Any) -> None:
        pass


class Part:
    """The time that a method takes, of all calls since the last look."""

    def __init__(self, owner: Any, name: str) -> None:
        self._call: Callable[..., Any] = getattr(owner, name)
        self.spent_s = 0.0
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        started = time.thread_time()
        try:
            return self._call(*args, **kwargs)
        finally:
            self.spent_s += time.thread_time() - started

    def look(self) -> float:
        spent, self.spent_s = self.spent_s, 0.0
        return spent


async def main() -> None:
    gateway, worker = Wire("gateway"), Wire("worker")
    gateway.other, worker.other = worker, gateway
    core = Core(GatewayConfig(GatewayId("gateway-0"), "bench", str(MODEL), MODEL_NAME, policy="goodput"), gateway)
    engine = StubEngine(worker, [gateway.address])
    core.update_membership(Membership(1, (engine.member,), (gateway.address,)))
    engine.beat()
    core.pump()
    app, sockets = App(core), [Sink() for _ in range(NUM_CONNECTIONS)]
    for socket in sockets:
        socket.connect(Connection(app.handle, time.monotonic, lambda connection: None, outbox=app.outbox))
    parts = {"tokenizing": Part(core.model._words, "encode"), "deciding": Part(core.dispatcher._policy, "decide")}
    rounds: list[dict[str, float]] = []

    async def ask(max_tokens: int) -> None:
        raw, started = completion(HttpAddress("bench", 80, tls=False, prefix=""), PROMPT_WORDS, max_tokens), time.thread_time()
        for socket in sockets:
            socket.protocol.data_received(raw)
        asked = {"request": time.thread_time() - started} | {name: part.look() for name, part in parts.items()}
        engine.take(worker.receive(0))
        rounds.append(asked | {"answer": await deliver()})

    async def deliver() -> float:
        started = time.thread_time()
        core.pump()
        await asyncio.sleep(0)
        return time.thread_time() - started

    for _ in range(ROUNDS):
        await ask(1)
    for name in rounds[0]:
        print(f"{name}: {min(each[name] for each in rounds) / NUM_CONNECTIONS * 1e6:.1f} µs")
    await ask(NUM_STEPS + 2)
    steps_s = []
    for _ in range(NUM_STEPS):
        engine.step()
        steps_s.append(await deliver())
    print(f"token: {sorted(steps_s)[NUM_STEPS // 10] / NUM_CONNECTIONS * 1e6:.2f} µs")


if __name__ == "__main__":
    uvloop.run(main())
