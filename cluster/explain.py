"""`GET /explain/ID` of one gateway, over plain HTTP."""

from urllib.parse import quote

import httpx
import msgspec

from ..messages.errors import ClusterError
from .gateway.decisions import RequestExplanation
from .plain_http import open_http

TIMEOUT_S = 10.0


def explain_over_http(url: str, some_id: str, api_key: str | None) -> RequestExplanation | None:
    """None: that gateway does not know the request, or keeps none. Raises EndpointError, ClusterError."""
    try:
        with open_http(url, api_key, TIMEOUT_S) as http:
            reply = http.get(f"/explain/{quote(some_id, safe='')}")
    except httpx.HTTPError as error:
        raise ClusterError(f"{url}: {error or type(error).__name__}") from None
    if reply.status_code == 404:
        return None
    if reply.status_code != 200:
        raise ClusterError(f"{url}: HTTP {reply.status_code}: {reply.text[:500]}")
    try:
        return msgspec.json.decode(reply.content, type=RequestExplanation)
    except msgspec.DecodeError as error:
        raise ClusterError(f"{url} is no gateway of this version of diptych: {error}") from None
