"""The deployment as its YAML file says it; nothing here has been started yet.

    name: llama-8b
    model:    {path: /models/Llama-3.1-8B-Instruct, dtype: bfloat16}
    pools:
      prefill: {workers: 2}
      decode:  {workers: 2, kv_memory: 8GiB}
    router:   {policy: least_loaded, port: 8000}

With `hosts: any` workers stand wherever the Ray cluster has room for them, and listen at their hosts' addresses (as the gateways do for
them) instead of the loopback; `pools.decode.node: rack-7` wants hosts that offer this Ray resource.

With `tp: 2` a worker has two ranks, which share the heads of every layer: on GPUs one each, of the same host.

Without a prefill pool the decode workers prefill by themselves (colocated). Where the pools' `block_size` or `kv_dtype` differ, prefill
workers convert what they send. Relative paths are relative to the file. Whatever is
wrong is a SpecError, one line for each key, with the key's path: `pools.decode.workers: must be >= 1, not 0`.
"""

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from ..kvtransfer.selection import what_is_wrong
from ..messages.errors import SpecError
from ..messages.requests import ServiceClass
from ..models.embedded.path import embedded_model_path
from .router.policy import LEAST_OBJECTIVE_MS
from .router.registry import POLICIES

EMBEDDED = "embedded"
MODEL_FILES = ("config.json", "tokenizer.json")
MERGE_TAG = "tag:yaml.org,2002:merge"         # `<<`, whose keys may be given again
RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")
MIN_ANSWER_S = 2.0                            # a few times the period in which members are asked, and what a busy one takes to answer
MAX_COUNT = 1_000_000_000
MAX_SIZE = 1 << 50                            # bytes
MAX_SHOWN = 100                               # characters of a value in a message
SIZE_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def parse_size(text: object) -> object:
    """`256MiB` → 268435456; anything else is left to pydantic."""
    if not isinstance(text, str | bool):
        return text
    spelled = str(text)
    for unit, factor in SIZE_UNITS.items():
        if spelled.endswith(unit) and spelled.removesuffix(unit).strip().isdecimal():
            return int(spelled.removesuffix(unit)) * factor
    raise ValueError(f"must be a number with one of {', '.join(SIZE_UNITS)}, like 256MiB, not {text!r}")


Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0, le=MAX_SIZE)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Milliseconds = Annotated[float, Field(ge=LEAST_OBJECTIVE_MS, allow_inf_nan=False, strict=True)]
Seconds = Positive
Count = Annotated[int, Field(ge=1, le=MAX_COUNT, strict=True)]
Flag = Annotated[bool, Field(strict=True)]


class Device(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"


class Hosts(StrEnum):
    ONE = "one"                               # the controller's, for all
    ANY = "any"                               # of the Ray cluster, for workers


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSpec(Section):
    path: str                                 # a Hugging Face folder, or "embedded"
    name: str | None = None                   # what clients call it; None: the folder's name
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    device: Device = Device.CPU

    @property
    def served_name(self) -> str:
        return self.name or Path(self.path).name


class ClassObjectives(Section):
    ttft_ms: Milliseconds | None = None
    tpot_ms: Milliseconds | None = None


class Objectives(ClassObjectives):
    classes: dict[ServiceClass, ClassObjectives] = {}          # instead, for requests of a class; batch has none unless it is here
    attainment: Annotated[float, Field(gt=0, le=1)] = 0.9      # share of requests that meet both


class PoolSpec(Section):
    workers: Count
    node: Annotated[str, Field(min_length=1)] | None = None    # a Ray resource that their hosts offer; None: any host
    tp: Count = 1                             # ranks of one worker, each on a GPU of its own
    block_size: Annotated[int, Field(ge=1, le=256, strict=True)] | None = None      # tokens; None: 16 on the CPU, 64 on a GPU
    kv_dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8_e4m3"] = "auto"      # of the KV pool; auto: the model's dtype
    max_model_len: Count | None = None
    max_step_tokens: Count | None = None      # None: 512 on the CPU, 2048 on a GPU
    max_sequences: Count | None = None        # None: 64 on the CPU, 256 on a GPU
    kv_memory: Size | None = None             # bytes, of all ranks; None: 256 MiB on the CPU; on a GPU what the model leaves of gpu_memory
    gpu_memory: Annotated[float, Field(gt=0, lt=1)] = 0.9      # share of a GPU that a worker takes
    num_blocks: Count | None = None           # instead of kv_memory
    num_threads: Count = 1                    # torch's, of each rank
    layer_group: Count | None = None
    prefix_cache: Flag = True


class PoolsSpec(Section):
    decode: PoolSpec
    prefill: PoolSpec | None = None           # None: colocated

    @property
    def by_name(self) -> dict[str, PoolSpec]:
        """Those that there are."""
        return {"decode": self.decode} if self.prefill is None else {"prefill": self.prefill, "decode": self.decode}


class RouterSpec(Section):
    policy: str = "least_loaded"
    local_path: Flag = False                  # decode workers prefill by themselves although there are prefill workers
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, strict=True)] = 8000         # 0: any free one
    processes: Count = 1                      # gateways; they share the port
    max_connections: Count = 8192             # of clients, to each gateway; the next ones get a 503. Fewer where open files are limited
    explain: Annotated[int, Field(ge=0, le=10_000, strict=True)] = 0        # requests whose decisions each gateway keeps; 0: none
    debug_headers: Flag = False               # answers tell their route and what was predicted


class TransferSpec(Section):
    transports: tuple[str, ...] | None = None  # in order of preference; None: shm on the CPU, nvlink on GPUs
    handoff_timeout_s: Seconds = 30.0
    min_gbps: Positive | None = None          # of a link between two workers; None: no floor
    below_floor: Literal["refuse", "warn"] = "refuse"         # what is slower: is not used, or only warned about


class SecuritySpec(Section):
    api_keys_file: str | None = None          # one key a line; None: open to all who reach the port
    # of each key, or of all clients together if there is none; the gateways share them out, and do not lend each other
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None    # prompts, and what comes: the most that may, until it is known


class TimeoutsSpec(Section):
    start_s: Seconds = 180.0                  # of a worker, model loading included
    answer_s: Annotated[float, Field(ge=MIN_ANSWER_S, allow_inf_nan=False, strict=True)] = 10.0      # until a silent member is killed
    stall_s: Seconds = 90.0                   # that its loop may stand still: longer than a step or a compilation may take
    drain_s: Seconds = 30.0                   # to finish what is under way
    request_s: Seconds = 600.0                # of a client, over all attempts


class Spec(Section):
    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$")]
    model: ModelSpec
    pools: PoolsSpec
    hosts: Hosts = Hosts.ONE
    slo: Objectives = Objectives()
    router: RouterSpec = RouterSpec()
    transfer: TransferSpec = TransferSpec()
    security: SecuritySpec = SecuritySpec()
    timeouts: TimeoutsSpec = TimeoutsSpec()

    @property
    def transports(self) -> tuple[str, ...]:
        """Of KV, in order of preference."""
        default = ("nvlink",) if self.model.device is Device.CUDA else ("shm",)
        return default if self.transfer.transports is None else self.transfer.transports

    @property
    def finest_tp(self) -> int:
        return max(pool.tp for pool in self.pools.by_name.values())

    def api_keys(self) -> frozenset[str]:
        """Raises SpecError: the file was there when the spec was read, and may not be now."""
        if self.security.api_keys_file is None:
            return frozenset()
        return frozenset(read_keys(Path(self.security.api_keys_file)))


def load_spec(path: Path) -> Spec:
    """Raises SpecError."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:             # of bytes, numbers and dates that are none
        raise SpecError(f"{path}: not YAML: {error}") from None
    except RecursionError:
        raise SpecError(f"{path}: is nested too deeply") from None
    if not isinstance(tree, dict):
        raise SpecError(f"{path}: must be a mapping of name, model, pools, …")
    return parse_spec(tree, path.parent)


def parse_spec(tree: dict[str, Any], folder: Path) -> Spec:
    """`folder` is what relative paths are relative to. Raises SpecError."""
    try:
        spec = Spec.model_validate(tree)
    except ValidationError as error:
        raise SpecError("\n".join(_line(detail) for detail in error.errors())) from None
    spec = _with_absolute_paths(spec, folder)
    problems = [*_impossible(spec), *_missing_files(spec)]
    if problems:
        raise SpecError("\n".join(problems))
    return spec


def read_keys(path: Path) -> list[str]:
    """Raises SpecError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"security.api_keys_file: {path}: {error}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if odd := [number for number, key in enumerate(keys, 1) if not (key.isascii() and key.isprintable() and " " not in key)]:
        text = f"key {odd[0]} of {len(keys)} is not of printable ASCII without spaces, which a header can carry"
        raise SpecError(f"security.api_keys_file: {path}: {text}")
    return keys


def _impossible(spec: Spec) -> list[str]:
    found = []
    if spec.router.policy not in POLICIES:
        found.append(f"router.policy: {spec.router.policy!r} is unknown; known: {', '.join(POLICIES)}")
    if spec.router.processes > 1 and spec.router.port == 0:
        found.append(f"router.port: must be a fixed port, since {spec.router.processes} processes share it")
    found.extend(f"transfer.transports: {problem}" for problem in what_is_wrong(spec.transports, spec.model.device))
    for name in ("requests_per_minute", "tokens_per_minute"):
        if spec.router.processes > (allowed := getattr(spec.security, name) or math.inf):
            found += [f"security.{name}: must be >= {spec.router.processes}, not {allowed}: the gateways share it out"]
    if spec.hosts is Hosts.ANY and spec.pools.prefill is not None and "ucx" not in spec.transports:
        named = ", ".join(spec.transports)
        found.append(f"hosts: any: transfer.transports must name ucx, not only {named}: nothing else reaches other hosts")
    for name, pool in spec.pools.by_name.items():
        found.extend(_impossible_pool(f"pools.{name}", pool, spec.hosts))
    found.extend(_uneven_tp(spec.pools))
    return found


def _impossible_pool(path: str, pool: PoolSpec, hosts: Hosts) -> list[str]:
    found = []
    if pool.node in RAYS_OWN:
        found.append(f"{path}.node: {pool.node!r} is a resource of Ray's own; give the hosts another")
    elif pool.node is not None and hosts is Hosts.ONE:
        found.append(f"{path}.node: needs hosts: any; otherwise all stand on the controller's host")
    if pool.num_blocks is not None and "kv_memory" in pool.model_fields_set:
        found.append(f"{path}.num_blocks: give this or kv_memory, not both")
    return found


def _uneven_tp(pools: PoolsSpec) -> list[str]:
    """A rank of the coarser pool must hold the heads of whole ranks of the finer."""
    if pools.prefill is None:
        return []
    here, there = pools.prefill.tp, pools.decode.tp
    if max(here, there) % min(here, there) == 0:
        return []
    return [f"pools.prefill.tp: {here}, and pools.decode.tp is {there}: one must be a multiple of the other"]


def _missing_files(spec: Spec) -> list[str]:
    found = []
    folder = Path(spec.model.path)
    if not folder.is_dir():
        found.append(f"model.path: no folder {folder}")
    else:
        found.extend(f"model.path: {folder} has no {name}" for name in MODEL_FILES if not (folder / name).is_file())
    keys_file = spec.security.api_keys_file
    if keys_file is not None and not Path(keys_file).is_file():
        found.append(f"security.api_keys_file: no file {keys_file}")
    elif keys_file is not None and not read_keys(Path(keys_file)):
        found.append(f"security.api_keys_file: {keys_file} holds no key")
    return found


def _with_absolute_paths(spec: Spec, folder: Path) -> Spec:
    model_path = _embedded() if spec.model.path == EMBEDDED else folder / _expanded("model.path", spec.model.path)
    keys_file = spec.security.api_keys_file
    keys_path = None if keys_file is None else str((folder / _expanded("security.api_keys_file", keys_file)).absolute())
    return spec.model_copy(
        update={
            "model": spec.model.model_copy(update={"path": str(model_path.absolute())}),
            "security": spec.security.model_copy(update={"api_keys_file": keys_path}),
        }
    )


def _expanded(key: str, text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise SpecError(f"{key}: no home folder for {text!r}") from None


def _embedded() -> Path:
    try:
        return embedded_model_path()
    except FileNotFoundError as error:
        raise SpecError(f"model.path: {error}") from None


def _line(detail: ErrorDetails) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    given, limits = _shown(detail["input"]), detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            return f"{path}: unknown key"
        case "missing":
            return f"{path}: is missing"
        case "greater_than_equal":
            return f"{path}: must be >= {limits['ge']}, not {given}"
        case "greater_than":
            return f"{path}: must be > {limits['gt']}, not {given}"
        case "less_than_equal":
            return f"{path}: must be <= {limits['le']}, not {given}"
        case "value_error":
            return f"{path}: {limits['error']}"
    return f"{path}: {detail['msg']}, not {given}"


def _shown(given: object) -> str:
    if isinstance(given, int) and given.bit_length() > MAX_SHOWN:            # Python refuses to write the largest in decimal
        return f"a number of {given.bit_length()} bits"
    text = repr(given)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


class _StrictLoader(yaml.SafeLoader):
    """A key given twice is a mistake, not a choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node in (each for each, _ in node.value if each.tag != MERGE_TAG):
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"key {key!r} is given twice, line {key_node.start_mark.line + 1}")
            seen.append(key)
        return super().construct_mapping(node, deep)
