"""`x-diptych-*`, for who asked for `debug_headers`: where an answer came from and what was predicted of it (of its first choice); which
way a request is to go."""

import math

from ...messages.requests import Route
from ..router.policy import Path
from .errors import BadRequest
from .exchange import Exchange
from .generation import Generation
from .response_head import Headers

PATH_HEADER = "x-diptych-path"


def debug_headers(generation: Generation) -> Headers:
    """Of the last attempt. TTFT counts from the HTTP request, as clients count it; without a prediction, only the route."""
    if generation.route is None:
        return ()
    headers: Headers = (("x-diptych-route", _route_text(generation.route)),)
    if generation.prediction is None or (ttft_s := generation.predicted_ttft_s) is None:
        return headers
    times = (("x-diptych-predicted-ttft-ms", ttft_s), ("x-diptych-predicted-tpot-ms", generation.prediction.tpot_s))
    return headers + tuple((name, f"{seconds * 1e3:.1f}") for name, seconds in times if math.isfinite(seconds))


def _route_text(route: Route) -> str:
    """`prefill-0>decode-1`, or the worker alone that did both."""
    return route.decode.worker_id if route.prefill is None else f"{route.prefill.worker_id}>{route.decode.worker_id}"


def path_asked(exchange: Exchange, allowed: bool) -> Path | None:
    """None: the policy is to choose. Raises BadRequest."""
    text = exchange.header(PATH_HEADER)
    if text is None:
        return None
    if not allowed:
        raise BadRequest(f"the header {PATH_HEADER} is only taken where the spec says router.debug_headers", param=PATH_HEADER)
    if text not in list(Path):
        raise BadRequest(f"the header {PATH_HEADER} must be one of {', '.join(Path)}, not {text!r}", param=PATH_HEADER)
    return Path(text)
