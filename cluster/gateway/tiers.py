"""OpenAI's service_tier → a class, and what a request of that class is promised.

    the deployment's objectives  ◄─ overridden by ─  its class's  ◄─ overridden by ─  the request's headers
"""

import math
from collections.abc import Mapping

from ...messages.requests import ServiceClass
from ..router.policy import LEAST_OBJECTIVE_MS, NO_OBJECTIVES, Objectives
from .errors import BadRequest
from .exchange import Exchange

CLASS_OF_TIER = {
    "auto": ServiceClass.DEFAULT,
    "default": ServiceClass.DEFAULT,
    "priority": ServiceClass.PRIORITY,
    "flex": ServiceClass.BATCH,
    "batch": ServiceClass.BATCH,
}
TTFT_HEADER, TPOT_HEADER = "x-diptych-ttft-ms", "x-diptych-tpot-ms"


def told_tier(asked: str | None) -> str:
    """What the answer says: the one that was asked for, for each is served."""
    return "default" if asked in (None, "auto") else asked


def objectives_for(
    service_class: ServiceClass, exchange: Exchange, deployment: Objectives, classes: Mapping[ServiceClass, Objectives]
) -> Objectives:
    """Batch work is promised nothing but what its class or its own headers say. Raises BadRequest."""
    promised = classes.get(service_class, NO_OBJECTIVES if service_class is ServiceClass.BATCH else deployment)
    ttft_s, tpot_s = _header_s(exchange, TTFT_HEADER), _header_s(exchange, TPOT_HEADER)
    return Objectives(promised.ttft_s if ttft_s is None else ttft_s, promised.tpot_s if tpot_s is None else tpot_s)


def _header_s(exchange: Exchange, name: str) -> float | None:
    text = exchange.header(name)
    if text is None:
        return None
    try:
        ms = math.nan if "_" in text else float(text)            # which Python's own numbers may have
    except ValueError:
        ms = math.nan
    if not LEAST_OBJECTIVE_MS <= ms < math.inf:
        least = f"at least {LEAST_OBJECTIVE_MS:g}"
        raise BadRequest(f"the header {name} must be a number of milliseconds, {least}, not {text!r}", param=name)
    return ms / 1e3
