"""What an endpoint says of itself before the load begins: GET /v1/models."""

import asyncio

import msgspec

from .client import ExchangeFailed, HttpClient
from .errors import EndpointError

DISCOVERY_DEADLINE_S = 10.0
MAX_DISCOVERY_BYTES = 1 << 20


class ModelCard(msgspec.Struct, frozen=True):
    """An entry of /v1/models; the last two are extensions that some servers send."""

    id: str
    max_model_len: int | None = None    # prompt + output tokens
    vocab_size: int | None = None


class ModelList(msgspec.Struct, frozen=True):
    data: list[ModelCard]


class _Body:
    def __init__(self) -> None:
        self.content = b""

    def receive(self, status: int, body: bytes) -> None:
        self.content = (self.content + body)[:MAX_DISCOVERY_BYTES]


async def find_model(client: HttpClient, wanted: str | None) -> ModelCard:
    """The model of that name, or the first one. A server without /v1/models is taken at the user's word. Raises EndpointError."""
    body, where = _Body(), str(client.address)
    try:
        async with asyncio.timeout(DISCOVERY_DEADLINE_S):
            status = await client.exchange(client.address.request("GET", "/v1/models"), body)
    except TimeoutError as error:
        raise EndpointError(f"{where} did not answer GET /v1/models within {DISCOVERY_DEADLINE_S} s") from error
    except ExchangeFailed as error:
        raise EndpointError(f"{where} does not answer: {error}") from error
    if status == 404 and wanted is not None:
        return ModelCard(wanted)
    if status != 200:
        raise EndpointError(f"{where} answers GET /v1/models with HTTP {status}: {body.content[:200].decode(errors='replace')}")
    try:
        cards = msgspec.json.decode(body.content, type=ModelList).data
    except msgspec.MsgspecError as error:
        raise EndpointError(f"{where} answers GET /v1/models with something else than a list of models: {error}") from error
    for card in cards:
        if wanted in (None, card.id):
            return card
    raise EndpointError(f"{where} serves {[card.id for card in cards]}, not {wanted!r}")
