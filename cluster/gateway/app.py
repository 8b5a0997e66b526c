"""The HTTP side of a gateway, free of any server: an Exchange comes in, is routed, authenticated, parsed and answered.

    POST /v1/completions   POST /v1/chat/completions   GET /v1/models   GET /v1/models/{id}      (API key, if any is set)
    GET /explain/{id}                                                                            (the same)
    GET /health   GET /ready   GET /metrics                                                      (open)

Over a connection that is one too many, only what is open to all is answered: whoever watches a full gateway must see that it lives.
A caller's mistake is a 4xx in OpenAI's shape; only a fault of ours is a 500, logged with its trace.
"""

import hmac
import logging
import math
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST

from ...messages.errors import DiptychError, Refused
from .answer import Answer
from .bodies import ChatBody, CompletionBody, parse, refuse_unsupported
from .chat import ChatDialect
from .completions import CompletionDialect
from .core import Core
from .debug_headers import debug_headers, path_asked
from .dialects import Dialect
from .errors import BadRequest, Crowded, ErrorText, HttpError, RateLimited, to_http
from .exchange import ClientGone, Exchange
from .jobs import Job, JobMaker
from .outbox import Outbox
from .rate_limits import RateLimiter
from .responder import JSON, Reply, StreamResponder, Turn, WholeResponder
from .response_head import Headers
from .siblings import Siblings
from .tiers import objectives_for

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,256}")
_MODEL_PREFIX = "/v1/models/"
_EXPLAIN_PREFIX = "/explain/"
OUR_FAULT = HttpError(500, ErrorText("a fault of the gateway; its log has the trace", "server_error", code="internal"))


class Call(NamedTuple):
    """What a handler gets."""

    exchange: Exchange
    request_id: str
    headers: Headers                          # of every answer to this request
    arrived_at: float


class Endpoint(NamedTuple):
    method: str
    handle: Callable[[Call], Awaitable[None]]
    public: bool = False                      # no API key needed


class App:
    def __init__(self, core: Core) -> None:
        self._core = core
        self._jobs = JobMaker(core.model, core.config.model_name)
        self._keys = [key.encode() for key in core.config.api_keys]
        self.outbox = Outbox()
        self._turn = Turn(self.outbox)
        self._limiter = RateLimiter(core.config.rate_limits, core.clock)
        self.siblings = Siblings(core.config, core.render_metrics)
        self._endpoints = {
            "/v1/completions": Endpoint("POST", self._completions),
            "/v1/chat/completions": Endpoint("POST", self._chat),
            "/v1/models": Endpoint("GET", self._models),
            "/health": Endpoint("GET", self._health, public=True),
            "/ready": Endpoint("GET", self._ready, public=True),
            "/metrics": Endpoint("GET", self._metrics, public=True),
        }
        self._below = {_MODEL_PREFIX: Endpoint("GET", self._model), _EXPLAIN_PREFIX: Endpoint("GET", self._explain)}

    def soon(self, call: Callable[[], None]) -> None:
        """Before the next tokens are written, which may take a while."""
        self._turn.add(call, is_first=True)

    async def turn_away(self, exchange: Exchange) -> None:
        """Of a connection over the limit."""
        await self.handle(exchange, crowded=True)

    async def handle(self, exchange: Exchange, *, crowded: bool = False) -> None:
        request_id = _request_id(exchange)
        call = Call(exchange, request_id, (("x-request-id", request_id),), self._core.clock())
        name, endpoint = self._find(exchange.path)
        exchange.on_status = partial(self._core.metrics.responded, name)
        try:
            if crowded:
                self._refuse_crowd(endpoint)
            self._check(call.exchange, endpoint)
            assert endpoint is not None
            await endpoint.handle(call)
        except ClientGone:
            return
        except Exception as error:
            self._fail(call, error)

    def _find(self, path: str) -> tuple[str, Endpoint | None]:
        """With the name under which it is counted: clients' paths are not ours to count."""
        if path in self._endpoints:
            return path, self._endpoints[path]
        for prefix, endpoint in self._below.items():
            if path.startswith(prefix) and path != prefix:
                return prefix, endpoint
        return "other", None

    def _refuse_crowd(self, endpoint: Endpoint | None) -> None:
        """Raises Crowded."""
        if endpoint is None or not endpoint.public:
            self._core.metrics.turned_away()
            raise Crowded(f"this gateway has {self._core.config.limits.max_connections} connections open, as many as it may")

    def _check(self, exchange: Exchange, endpoint: Endpoint | None) -> None:
        """Raises BadRequest."""
        if (endpoint is None or not endpoint.public) and self._keys and _key_of(exchange, self._keys) is None:
            raise BadRequest("no valid API key in the Authorization header (Bearer …)", code="invalid_api_key", status=401)
        if endpoint is None:
            raise BadRequest(f"unknown path {exchange.path}", code="not_found", status=404)
        if exchange.method != endpoint.method and (exchange.method, endpoint.method) != ("HEAD", "GET"):
            raise BadRequest(f"{exchange.path} takes {endpoint.method}, not {exchange.method}", code="method_not_allowed", status=405)

    async def _completions(self, call: Call) -> None:
        body = parse(await call.exchange.read(self._core.config.limits.max_body_bytes), CompletionBody)
        self._check_body(body)
        job = await self._jobs.completion(body, self._core.max_model_len)
        self._answer(call, job, CompletionDialect(job, body.model, self._core.model.vocabulary))

    async def _chat(self, call: Call) -> None:
        body = parse(await call.exchange.read(self._core.config.limits.max_body_bytes), ChatBody)
        self._check_body(body)
        job = await self._jobs.chat(body, self._core.max_model_len)
        self._answer(call, job, ChatDialect(job, body.model, self._core.model.vocabulary))

    def _check_body(self, body: CompletionBody | ChatBody) -> None:
        self._check_model(body.model)
        refuse_unsupported(body)

    def _check_model(self, name: str) -> None:
        served = self._core.config.model_name
        if name != served:
            text = f"the model {name!r} does not exist; this endpoint serves {served!r}"
            raise BadRequest(text, param="model", code="model_not_found", status=404)

    def _answer(self, call: Call, job: Job, dialect: Dialect[Any]) -> None:
        """Raises RateLimited, BadRequest, ClientGone. The answer goes its own way after this."""
        if call.exchange.gone:
            raise ClientGone
        core, timeout_s = self._core, self._core.config.limits.request_timeout_s
        objectives = objectives_for(job.service_class, call.exchange, core.config.objectives, core.config.class_objectives)
        path, deadline = path_asked(call.exchange, core.config.debug_headers), call.arrived_at + timeout_s
        key = _key_of(call.exchange, self._keys) or b""
        taken = self._limiter.guess(job.min_tokens, job.max_tokens, job.num_choices) if job.is_open else job.max_tokens
        limits = self._admit(key, job, taken)
        answer = Answer(job, core.dispatcher, core.model.vocabulary, call.arrived_at, deadline, objectives, path)
        core.decisions.begin(job.response_id, call.request_id)

        def headers() -> Headers:
            return call.headers + limits + (debug_headers(answer.first) if core.config.debug_headers else ())

        def fail(error: Exception) -> None:
            self._fail(call._replace(headers=call.headers + self._limiter.headers(key)), error)

        def ended() -> None:
            """Who was refused before a token came has used up nothing, and may ask again."""
            is_spared = isinstance(answer.error, Refused) and not answer.has_begun
            self._limiter.give_back(key, int(is_spared), taken - (0 if is_spared else answer.num_tokens))

        reply = Reply(call.exchange, answer, dialect, headers, fail, ended)
        stream = StreamResponder(reply, usage=job.include_usage, timeout_s=timeout_s) if job.stream else WholeResponder(reply)
        stream.start(self._turn)

    def _admit(self, key: bytes, job: Job, num_tokens: int) -> Headers:
        """Raises RateLimited."""
        try:
            return self._limiter.admit(key, 1, num_tokens)
        except RateLimited:
            self._core.metrics.rate_limited(job.num_choices)
            raise

    async def _models(self, call: Call) -> None:
        _send_json(call, 200, {"object": "list", "data": [self._model_entry()]})

    async def _model(self, call: Call) -> None:
        self._check_model(call.exchange.path.removeprefix(_MODEL_PREFIX))
        _send_json(call, 200, self._model_entry())

    def _model_entry(self) -> dict[str, str | int]:
        return {
            "id": self._core.config.model_name,
            "object": "model",
            "created": self._core.created,
            "owned_by": "diptych",
            "max_model_len": self._core.max_model_len,
            "vocab_size": self._core.model.vocab_size,
        }

    async def _explain(self, call: Call) -> None:
        if not self._core.decisions.on:
            raise BadRequest("decisions are not kept; the spec's router.explain says how many", code="explain_off", status=404)
        asked_id = call.exchange.path.removeprefix(_EXPLAIN_PREFIX)
        found = self._core.decisions.find(asked_id)
        if found is None:
            kept = self._core.config.explain
            text = f"no request {asked_id!r} among the last {kept} of {self._core.config.gateway_id}"
            raise BadRequest(text, code="request_not_found", status=404)
        call.exchange.respond(200, (JSON, *call.headers), msgspec.json.encode(found))

    async def _health(self, call: Call) -> None:
        _send_json(call, 200, {"status": "ok"})

    async def _ready(self, call: Call) -> None:
        reason = self._core.why_not_ready()
        if reason is None:
            _send_json(call, 200, {"status": "ready"})
        else:
            _send_json(call, 503, {"status": "not ready", "reason": reason})

    async def _metrics(self, call: Call) -> None:
        call.exchange.respond(200, (("content-type", CONTENT_TYPE_LATEST), *call.headers), await self.siblings.metrics())

    def _fail(self, call: Call, error: Exception) -> None:
        if isinstance(error, DiptychError):
            self._refuse(call, to_http(error))
            return
        logger.error("%s %s failed", call.exchange.method, call.exchange.path, exc_info=error)
        if call.exchange.status is None:
            self._refuse(call, OUR_FAULT)
        else:
            call.exchange.abort()

    def _refuse(self, call: Call, error: HttpError) -> None:
        headers = call.headers + error.headers
        if error.retry_after_s is not None:
            headers += (("retry-after", str(math.ceil(error.retry_after_s))),)
        if error.status == 401:
            headers += (("www-authenticate", "Bearer"),)
        if error.status == 405 and (endpoint := self._find(call.exchange.path)[1]) is not None:
            headers += (("allow", endpoint.method),)
        call.exchange.respond(error.status, (JSON, *headers), error.body)


def _key_of(exchange: Exchange, keys: Sequence[bytes]) -> bytes | None:
    """The one of `keys` that the client shows, in a time that does not tell which one is nearly right."""
    if not keys:
        return None
    scheme, _, given = (exchange.header("authorization") or "").partition(" ")
    matching = [key for key in keys if hmac.compare_digest(given.strip().encode(), key)]
    return matching[0] if scheme.lower() == "bearer" and matching else None


def _request_id(exchange: Exchange) -> str:
    """The client's own, if it is one that may stand in a header."""
    given = exchange.header("x-request-id")
    return given if given is not None and _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)


def _send_json(call: Call, status: int, body: dict[str, Any]) -> None:
    call.exchange.respond(status, (JSON, *call.headers), msgspec.json.encode(body))
