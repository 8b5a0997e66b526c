"""What one gateway process needs to know to start: values only, handed from the spec through the controller."""

from msgspec import Struct

from ...messages.ids import GatewayId
from ...messages.requests import ServiceClass
from ..router.policy import Objectives
from ..router.registry import PolicyOptions
from .rate_limits import RateLimits


class Limits(Struct, frozen=True):
    """Every wait has a deadline, every queue an end."""

    request_timeout_s: float = 600.0          # from the HTTP request to its last token, over all attempts
    queue_timeout_s: float = 60.0             # without any route
    stall_timeout_s: float = 30.0             # without a new token (or a turn in a worker's queue), until another attempt
    silent_after_s: float = 3.0               # without a heartbeat, until a worker counts as dead
    grace_s: float = 10.0                     # for open answers when the gateway stops
    max_attempts: int = 5                     # per choice
    max_live_choices: int = 4096              # in this gateway; more are refused with 429
    max_connections: int = 8192               # open at a time; the next ones get a 503
    max_body_bytes: int = 8 << 20
    max_buffered_tokens: int = 4096           # per choice, generated but not yet taken by a slow client


class GatewayConfig(Struct, frozen=True):
    gateway_id: GatewayId
    cluster: str                              # the deployment's name
    model_path: str                           # folder with tokenizer.json, tokenizer_config.json, config.json
    model_name: str                           # what clients call it
    policy: str = "least_loaded"
    policy_options: PolicyOptions = PolicyOptions()
    objectives: Objectives = Objectives()
    class_objectives: dict[ServiceClass, Objectives] = {}      # instead of `objectives`
    host: str = "127.0.0.1"
    port: int = 0                             # 0: any free one
    reuse_port: bool = False                  # several gateway processes share the port
    gateways: tuple[GatewayId, ...] = ()      # of the deployment, this one among them
    api_keys: frozenset[str] = frozenset()    # empty: open to all who reach it
    rate_limits: RateLimits = RateLimits()    # of each key
    limits: Limits = Limits()
    explain: int = 0                          # requests whose decisions are kept
    debug_headers: bool = False               # answers tell their route and what was predicted

    def __repr__(self) -> str:
        return f"GatewayConfig({self.gateway_id}, {self.model_name} of {self.cluster}, {self.policy}, {self.host}:{self.port})"
