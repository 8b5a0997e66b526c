"""What a worker needs to know to start: values only, handed from the spec through the controller to the process."""

from msgspec import Struct

from ..messages.ids import Epoch, WorkerId


class EngineConfig(Struct, frozen=True):
    """One model replica. Workers of a deployment differ in their memory and in how they hold KV."""

    model_path: str                       # a local Hugging Face folder
    load_format: str = "safetensors"      # or "dummy": seeded random weights of the real shape
    dtype: str = "auto"                   # "auto": the folder's own on a GPU, float32 on the CPU
    kv_dtype: str = "auto"                # of the KV pool; "auto": dtype; "fp8_e4m3": with the folder's scales, if it has some
    device: str = "cpu"                   # "cpu" or "cuda"
    block_size: int = 16                  # tokens of one KV block
    num_blocks: int | None = None         # None: as many as kv_memory_bytes holds
    kv_memory_bytes: int | None = None    # of all ranks; None: on the CPU 256 MiB; on a GPU what the model leaves of gpu_memory
    gpu_memory: float = 0.9               # share of a GPU's memory that weights, activations and KV take together
    max_model_len: int | None = None      # None: the model's own limit
    max_step_tokens: int = 512            # token budget of one step: what chunks prefill
    max_sequences: int = 64               # that take part in one step
    layer_group: int | None = None        # layers whose pages leave together; None: one on the CPU, an eighth of them all on a GPU
    prefix_cache: bool = True
    tp: int = 1                           # ranks that share each layer's heads and gates, on a GPU each


class ReceiverPool(Struct, frozen=True):
    """How the workers that KV is handed to hold it."""

    block_size: int
    kv_dtype: str = "auto"


class WorkerConfig(Struct, frozen=True):
    """One life of one worker."""

    cluster: str                          # the deployment's name
    worker_id: WorkerId
    epoch: Epoch
    engine: EngineConfig
    transports: tuple[str, ...] = ("shm",)     # of KV, in order of preference
    host: str | None = "127.0.0.1"        # interface for messages; None: its host's address
    num_threads: int = 1                  # torch CPU threads
    heartbeat_s: float = 0.05             # between load reports
    handoff_timeout_s: float = 30.0       # without progress on one side until that side gives the handoff up
    probe_links: bool = False             # a prefill worker measures its link to each decode worker that it meets
    min_gbps: float = 0.0                 # what such a link must reach; 0: anything will do
    receiver: ReceiverPool | None = None  # of a prefill worker; None: as it does itself
    refuse_below_floor: bool = True       # a link that does not is not used; False: it is only warned about
    finest_tp: int = 1                    # the largest tp of the deployment: KV is written in pieces of the heads that one of its ranks has
