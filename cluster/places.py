"""From the spec: the places of a deployment (`prefill-0`, `decode-1`, `gateway-0`) and what the process at each needs to start.

A place keeps its name; each process that stands there is a life of it, numbered by its epoch.
"""

from dataclasses import dataclass
from enum import StrEnum

from ..engine.config import EngineConfig, ReceiverPool, WorkerConfig
from ..messages.ids import Epoch, GatewayId, WorkerId
from .gateway.config import GatewayConfig, Limits
from .gateway.rate_limits import RateLimits
from .router.policy import Objectives
from .router.registry import PolicyOptions
from .spec import ClassObjectives, Device, Hosts, PoolSpec, Spec


@dataclass(frozen=True)
class PoolDefaults:
    block_size: int
    max_step_tokens: int
    max_sequences: int


DEFAULTS = {Device.CPU: PoolDefaults(16, 512, 64), Device.CUDA: PoolDefaults(64, 2048, 256)}


class PlaceKind(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    GATEWAY = "gateway"


@dataclass(frozen=True, order=True)
class PlaceName:
    kind: PlaceKind
    index: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.index}"

    @staticmethod
    def parse(text: str) -> "PlaceName":
        kind, _, index = text.rpartition("-")
        return PlaceName(PlaceKind(kind), int(index))


def places_of(spec: Spec) -> frozenset[PlaceName]:
    prefill = spec.pools.prefill.workers if spec.pools.prefill else 0
    sizes = {PlaceKind.PREFILL: prefill, PlaceKind.DECODE: spec.pools.decode.workers, PlaceKind.GATEWAY: spec.router.processes}
    return frozenset(PlaceName(kind, index) for kind, size in sizes.items() for index in range(size))


def num_gpus(spec: Spec) -> int:
    """That all workers take together."""
    return sum(pool.workers * gpus_each(spec, pool) for pool in spec.pools.by_name.values())


def gpus_each(spec: Spec, pool: PoolSpec) -> int:
    """That a worker takes, all of one host."""
    return pool.tp if spec.model.device is Device.CUDA else 0


def worker_config(spec: Spec, place: PlaceName, epoch: Epoch) -> WorkerConfig:
    pool = pool_of(spec, place.kind)
    return WorkerConfig(
        cluster=spec.name,
        worker_id=WorkerId(str(place)),
        epoch=epoch,
        engine=_engine_config(spec, pool),
        receiver=_receiver(spec) if place.kind is PlaceKind.PREFILL else None,
        transports=spec.transports,
        host=mailbox_host(spec),
        num_threads=pool.num_threads,
        handoff_timeout_s=spec.transfer.handoff_timeout_s,
        probe_links=True,
        min_gbps=spec.transfer.min_gbps or 0.0,
        refuse_below_floor=spec.transfer.below_floor == "refuse",
        finest_tp=spec.finest_tp,
    )


def gateway_config(spec: Spec, place: PlaceName, any_port: int = 0) -> GatewayConfig:
    """`any_port`: the one to take if the spec leaves it open. Raises SpecError: the API keys are read now."""
    return GatewayConfig(
        gateway_id=GatewayId(str(place)),
        cluster=spec.name,
        model_path=spec.model.path,
        model_name=spec.model.served_name,
        policy=spec.router.policy,
        policy_options=PolicyOptions(local_path=spec.router.local_path, seed=2 * place.index),
        objectives=_objectives(spec.slo),
        class_objectives={name: _objectives(promised) for name, promised in spec.slo.classes.items()},
        host=spec.router.host,
        port=spec.router.port or any_port,
        reuse_port=spec.router.processes > 1,
        gateways=tuple(GatewayId(str(each)) for each in sorted(places_of(spec)) if each.kind is PlaceKind.GATEWAY),
        api_keys=spec.api_keys(),
        rate_limits=_rate_limits(spec),
        limits=Limits(
            request_timeout_s=spec.timeouts.request_s, grace_s=spec.timeouts.drain_s, max_connections=spec.router.max_connections
        ),
        explain=spec.router.explain,
        debug_headers=spec.router.debug_headers,
    )


def mailbox_host(spec: Spec) -> str | None:
    """The interface for messages between members; None: at the address of the host that a member stands on."""
    return "127.0.0.1" if spec.hosts is Hosts.ONE else None


def pool_of(spec: Spec, kind: PlaceKind) -> PoolSpec:
    pool = spec.pools.prefill if kind is PlaceKind.PREFILL else spec.pools.decode
    assert pool is not None, "a colocated deployment has no prefill places"
    return pool


def _rate_limits(spec: Spec) -> RateLimits:
    """Gateways do not tell each other what they have let in: each has its part."""
    whole, part = spec.security, spec.router.processes
    rates = (whole.requests_per_minute, whole.tokens_per_minute)
    return RateLimits(*(None if rate is None else rate / part for rate in rates))


def _objectives(promised: ClassObjectives) -> Objectives:
    return Objectives(_seconds(promised.ttft_ms), _seconds(promised.tpot_ms))


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1e3


def _receiver(spec: Spec) -> ReceiverPool:
    engine = _engine_config(spec, spec.pools.decode)
    return ReceiverPool(engine.block_size, engine.kv_dtype)


def _engine_config(spec: Spec, pool: PoolSpec) -> EngineConfig:
    default = DEFAULTS[spec.model.device]
    return EngineConfig(
        model_path=spec.model.path,
        load_format=spec.model.load_format,
        dtype=spec.model.dtype,
        device=spec.model.device,
        kv_dtype=pool.kv_dtype,
        block_size=pool.block_size or default.block_size,
        num_blocks=pool.num_blocks,
        kv_memory_bytes=pool.kv_memory,
        gpu_memory=pool.gpu_memory,
        max_model_len=pool.max_model_len,
        max_step_tokens=pool.max_step_tokens or default.max_step_tokens,
        max_sequences=pool.max_sequences or default.max_sequences,
        layer_group=pool.layer_group,
        prefix_cache=pool.prefix_cache,
        tp=pool.tp,
    )
