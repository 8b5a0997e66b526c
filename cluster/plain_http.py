"""An HTTP client for one endpoint, as commands talk to it."""

import httpx

from ..messages.errors import ClusterError
from .bench.client import Address


def open_http(url: str, api_key: str | None, timeout: httpx.Timeout | float) -> httpx.Client:
    """Takes the same URLs as `bench`. Raises EndpointError, ClusterError."""
    base_url = str(Address.parse(url, api_key))
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        return httpx.Client(base_url=base_url, headers=headers, timeout=timeout, trust_env=False)
    except httpx.InvalidURL as error:                         # such as 999.1.1.1, which a resolver might take
        raise ClusterError(f"{url!r} is not a URL: {error}") from error
