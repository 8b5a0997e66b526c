"""A gateway among scripted workers: the whole token path of the gateway in one loop, over a fake network, without a model.

    async with House(tmp_path) as house:
        reply = await house.post("/v1/completions", {...})

A worker "generates" the bytes of `house.says`, one token a byte or special id, from where the request says it continues. Each turn of the
loop delivers what is in flight and lets every decode worker make one step.
"""

import asyncio
import contextlib
import functools
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec

from harness.http_bytes import Client, Reply
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from diptych.cluster.gateway.app import App
from diptych.cluster.gateway.config import GatewayConfig, Limits
from diptych.cluster.gateway.core import Core
from diptych.messages.fake_post import FakeNetwork, FakePost
from diptych.messages.ids import Epoch, GatewayId, WorkerId
from diptych.messages.membership import Member, Membership, Role
from diptych.messages.requests import (
    Abort,
    FinishReason,
    GenerateRequest,
    LoadReport,
    LoadUpdate,
    RequestFailed,
    RequestSpan,
    StepTokens,
    TokenDelta,
    TokenLogprobs,
    WorkerRef,
)

MODEL = "tiny"
CONTEXT = 128
VOCAB_SIZE = 256 + 4
BOS, EOS, USER, ASSISTANT = range(256, 260)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|assistant|>' if m.role == 'assistant' else '<|user|>' }}{{ m.content }}{% endfor %}<|assistant|>"
)


def make_model(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A byte-level tokenizer without merges: every byte is a token whose id is the byte."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE({char: byte for byte, char in enumerate(_char_of_byte())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>", "<|user|>", "<|assistant|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": CONTEXT, "eos_token_id": EOS}
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _char_of_byte() -> list[str]:
    """Byte-level BPE writes printable Latin-1 as itself, and the other bytes, in order, as what else its alphabet has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = iter([char for char in alphabet if ord(char) > 255])
    return [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]


def tokens_of(text: str | bytes) -> list[int]:
    return list(text.encode() if isinstance(text, str) else text)


@dataclass(eq=False)
class FakeWorker:
    house: "House"
    ref: WorkerRef
    role: Role
    post: FakePost
    received: list[GenerateRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    decoding: dict[str, tuple[GenerateRequest, int]] = field(default_factory=dict)       # request id → request, next output index
    frozen: bool = False                      # takes messages, answers nothing

    def turn(self) -> None:
        for message in self.post.receive(0):
            if isinstance(message, GenerateRequest):
                self.received.append(message)
                self._begin(message)
            elif isinstance(message, Abort):
                self.aborted.append(message.request_id)
                self.decoding.pop(message.request_id, None)
        if not self.frozen:
            self.post.send(self.house.address, LoadUpdate(self._load()))
            for request, index in list(self.decoding.values()):
                self._step(request, index)

    def say(self, request: GenerateRequest, index: int, *, num_tokens: int = 1, prefill: bool = False) -> None:
        """Tokens `index` to `index + num_tokens` of the answer."""
        delta = self.house.delta(request, index, num_tokens, first=index == request.num_prior_outputs)
        self.post.send(request.gateway, StepTokens(self.ref, (delta,), self._load()))
        if delta.finish is not None:
            self.decoding.pop(request.request_id, None)
        elif not prefill:
            self.decoding[request.request_id] = (request, index + num_tokens)

    def fail(self, request: GenerateRequest, kind: Any, message: str, *, retryable: bool) -> None:
        self.decoding.pop(request.request_id, None)
        self.post.send(request.gateway, RequestFailed(request.request_id, kind, message, retryable, self.ref))

    def _begin(self, request: GenerateRequest) -> None:
        on_request = self.house.on_request
        if self.frozen or (on_request is not None and on_request(self, request)):
            return
        index = request.num_prior_outputs
        if request.route.prefill is None:
            self.decoding[request.request_id] = (request, index)
            return
        self.say(request, index, prefill=True)
        if request.sampling.max_tokens - index > 1:
            self._hand_over(request, index + 1)

    def _hand_over(self, request: GenerateRequest, index: int) -> None:
        decode = self.house.worker(request.route.decode.worker_id)
        if not decode.frozen:
            decode.decoding[request.request_id] = (request, index)
            span = RequestSpan(request.request_id, self.ref, decode.ref.worker_id, "fake", 4, 4096, 0, 0.001, 0.002)
            self.post.send(request.gateway, span)

    def _step(self, request: GenerateRequest, index: int) -> None:
        if index < self.house.pause_at:
            self.say(request, index)

    def _load(self) -> LoadReport:
        return LoadReport(self.ref, 0, 0, len(self.decoding), 0, 64, 64 - len(self.decoding), 16)


class House:
    def __init__(
        self, folder: Path, *, prefill: int = 1, decode: int = 1, chat_template: str | None = CHAT_TEMPLATE, **config: Any
    ) -> None:
        self.says: list[int] = [*tokens_of("Hello there"), EOS]
        self.pause_at = 1 << 30               # decode workers stop short of this output index
        self.on_request: Callable[[FakeWorker, GenerateRequest], bool] | None = None       # True: it has seen to it
        self.network = FakeNetwork()
        self.now = 1000.0
        self.post_office = self.network.post("gateway")
        self.address = self.post_office.address
        limits = config.pop("limits", Limits())
        model = make_model(folder, chat_template=chat_template)
        self.config = GatewayConfig(GatewayId("gateway-0"), "test", str(model), MODEL, limits=limits, **config)
        self.core = Core(self.config, self.post_office, clock=lambda: self.now)
        self.app = App(self.core)
        self.workers: list[FakeWorker] = []
        self._version = 0
        for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
            for i in range(count):
                self.add(WorkerId(f"{role}-{i}"), role)
        self.tell_membership()

    async def __aenter__(self) -> "House":
        self._turning = asyncio.create_task(self._turns())
        await self.until(lambda: True)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._turning.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._turning

    def add(self, worker_id: WorkerId, role: Role, epoch: int = 1) -> FakeWorker:
        post = self.network.post(f"{worker_id}/{epoch}")
        worker = FakeWorker(self, WorkerRef(worker_id, Epoch(epoch), post.address), role, post)
        self.workers.append(worker)
        return worker

    def kill(self, worker_id: str) -> None:
        """The process is gone; the controller has not said so yet."""
        worker = self.worker(worker_id)
        self.workers.remove(worker)
        self.network.kill(worker.ref.address)

    def tell_membership(self, draining: frozenset[str] = frozenset()) -> None:
        self._version += 1
        members = tuple(
            Member(worker.ref, worker.role, "layout", 16, 64, CONTEXT, draining=worker.ref.worker_id in draining) for worker in self.workers
        )
        self.core.update_membership(Membership(self._version, members, (self.address,)))

    def worker(self, worker_id: str) -> FakeWorker:
        return next(worker for worker in self.workers if worker.ref.worker_id == worker_id)

    def delta(self, request: GenerateRequest, index: int, num_tokens: int, *, first: bool) -> TokenDelta:
        end = min(index + num_tokens, request.sampling.max_tokens, len(self.says))
        token_ids = tuple(self.says[index:end])
        wants_prompt = first and request.sampling.prompt_logprobs is not None
        finish = None
        if token_ids and token_ids[-1] in request.sampling.stop_token_ids:
            finish = FinishReason.STOP
        elif end in (request.sampling.max_tokens, len(self.says)):
            finish = FinishReason.LENGTH
        return TokenDelta(
            request_id=request.request_id,
            index=index,
            token_ids=token_ids,
            finish=finish,
            logprobs=() if request.sampling.logprobs is None else tuple(map(logprobs_of, token_ids)),
            num_cached_tokens=3 if first else 0,
            prompt_logprobs=tuple(map(logprobs_of, request.token_ids[1:])) if wants_prompt else (),
        )

    async def until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s):
            while True:
                await asyncio.sleep(0)
                if condition():
                    return

    async def pass_time(self, seconds: float) -> None:
        """On the gateway's clock; then everything due is done."""
        self.now += seconds
        self.core.watch()
        await asyncio.sleep(0)

    def open(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Client:
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        return Client(self.app.handle, method, path, raw, headers or {}, self.app.outbox)

    async def send(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        return await self.open(method, path, body, headers).reply()

    async def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Reply:
        return await self.send("POST", path, {"model": MODEL} | body if isinstance(body, dict) else body, headers)

    async def get(self, path: str, headers: dict[str, str] | None = None) -> Reply:
        return await self.send("GET", path, None, headers)

    async def _turns(self) -> None:
        while True:
            self.network.deliver_all()
            for worker in list(self.workers):
                worker.turn()
            self.network.deliver_all()
            self.core.watch()
            await asyncio.sleep(0)


def logprobs_of(token_id: int) -> TokenLogprobs:
    """The token with −0.5, the two ids after it with −1 and −∞."""
    return TokenLogprobs(token_id, -0.5, ((token_id, -0.5), ((token_id + 1) % 256, -1.0), ((token_id + 2) % 256, float("-inf"))))


P = ParamSpec("P")


def in_loop(scenario: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """A test that is a coroutine."""

    @functools.wraps(scenario)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(scenario(*args, **kwargs))

    return run
