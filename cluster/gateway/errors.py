"""How a request can fail at the gateway, and what HTTP says of it.

DiptychError
├── RequestError → BadRequest         400, 401, 404, 405, 413: the caller's mistake, with `param` and `code` as OpenAI has them
├── CapacityError → Refused
│   ├── Overloaded                    429 with Retry-After: the cluster is full
│   ├── RateLimited                   429 with Retry-After: the API key has used up its minute
│   ├── NoRoute                       503 with Retry-After: no worker lives
│   └── Crowded                       503 with Retry-After: the gateway has all the connections it may
└── GenerationFailed                  a worker or a deadline ended it: by FailureKind
    └── SlowClient                    it took too long to read what it asked for
"""

import math

import msgspec
from msgspec import Struct

from ...messages.errors import DiptychError, Refused, RequestError
from ...messages.requests import FailureKind
from .response_head import Headers


class BadRequest(RequestError):
    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


class Overloaded(Refused):
    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimited(Refused):
    """`retry_after_s` is infinite for what is more than a whole minute's worth: then nothing is said of when."""

    def __init__(self, message: str, retry_after_s: float, headers: Headers) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.headers = headers


class NoRoute(Refused):
    pass


class Crowded(Refused):
    pass


class GenerationFailed(DiptychError):
    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class SlowClient(GenerationFailed):
    def __init__(self, message: str) -> None:
        super().__init__(FailureKind.TIMEOUT, message)


STATUS_OF_KIND = {
    FailureKind.PEER_LOST: 503,
    FailureKind.TIMEOUT: 504,
    FailureKind.INTERNAL: 500,
}
NO_ROUTE_RETRY_AFTER_S = 5.0
CROWDED_RETRY_AFTER_S = 1.0
REFUSED_RETRY_AFTER_S = 1.0


class ErrorText(Struct, frozen=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class _ErrorBody(Struct, frozen=True):
    error: ErrorText


class HttpError(Struct, frozen=True):
    status: int
    error: ErrorText
    retry_after_s: float | None = None
    headers: Headers = ()

    @property
    def body(self) -> bytes:
        """OpenAI's shape, {"error": {…}}."""
        return msgspec.json.encode(_ErrorBody(self.error))


def to_http(error: DiptychError) -> HttpError:
    text = str(error)
    match error:
        case BadRequest():
            return HttpError(error.status, ErrorText(text, "invalid_request_error", error.param, error.code))
        case Overloaded():
            return HttpError(429, ErrorText(text, "rate_limit_error", code="overloaded"), error.retry_after_s)
        case RateLimited():
            again_s = error.retry_after_s if math.isfinite(error.retry_after_s) else None
            return HttpError(429, ErrorText(text, "rate_limit_error", code="rate_limit_exceeded"), again_s, error.headers)
        case NoRoute():
            return HttpError(503, ErrorText(text, "server_error", code="no_route"), NO_ROUTE_RETRY_AFTER_S)
        case Crowded():
            return HttpError(503, ErrorText(text, "server_error", code="too_many_connections"), CROWDED_RETRY_AFTER_S)
        case GenerationFailed(kind=FailureKind.INVALID):
            return HttpError(400, ErrorText(text, "invalid_request_error", code=error.kind))
        case GenerationFailed(kind=FailureKind.REFUSED):
            return HttpError(429, ErrorText(text, "rate_limit_error", code=error.kind), REFUSED_RETRY_AFTER_S)
        case GenerationFailed():
            return HttpError(STATUS_OF_KIND[error.kind], ErrorText(text, "server_error", code=error.kind))
    return HttpError(500, ErrorText(text, "server_error", code="internal"))
