"""`x-diptych-*`: where an answer came from and what was predicted of it, for who asked for `debug_headers`. Of its first choice."""

import math

from ...messages.requests import Route
from .generation import Generation
from .response_head import Headers


def debug_headers(generation: Generation) -> Headers:
    """Of the last attempt. TTFT counts from the HTTP request, as clients count it; without a prediction, only the route."""
    if generation.route is None:
        return ()
    headers: Headers = (("x-diptych-route", _route_text(generation.route)),)
    if (predicted := generation.prediction) is None:
        return headers
    waited_s = generation.routed_at - generation.arrived_at
    times = (("x-diptych-predicted-ttft-ms", waited_s + predicted.ttft_s), ("x-diptych-predicted-tpot-ms", predicted.tpot_s))
    return headers + tuple((name, f"{seconds * 1e3:.1f}") for name, seconds in times if math.isfinite(seconds))


def _route_text(route: Route) -> str:
    """`prefill-0>decode-1`, or the decode worker alone that did both."""
    return route.decode.worker_id if route.prefill is None else f"{route.prefill.worker_id}>{route.decode.worker_id}"
