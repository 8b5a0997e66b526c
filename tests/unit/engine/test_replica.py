"""From a config to a replica: what does not fit is refused with its numbers and leaves no segment, and which weights share KV."""

import json
import math
import threading
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from diptych.engine import replica as replica_module
from diptych.engine.config import EngineConfig, ReceiverPool, WorkerConfig
from diptych.engine.idle_refresh import IDLE_SHARE, IdleRefresh
from diptych.engine.replica import build_replica, fingerprint
from diptych.engine.step_watch import StepWatch
from diptych.kvtransfer.layout import KVLayout
from diptych.kvtransfer.shm import SHM, ShmTransport
from diptych.kvtransfer.transport import KVPool
from diptych.messages.errors import ClusterError, DiptychError, ModelError, PoolTooSmall, UnsupportedModel, WeightMismatch
from diptych.messages.ids import Epoch, WorkerId
from diptych.messages.steps import StepFeatures, StepModel
from diptych.models.loader import LoadFormat

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "torch_dtype": "bfloat16",
}
BLOCK_BYTES = 3 * 2 * 2 * 16 * 4 * 4        # layers, K and V, heads, tokens, head_dim, fp32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return tmp_path


def config(folder: Path, **changes: Any) -> WorkerConfig:
    plain = EngineConfig(str(folder), load_format="dummy", num_blocks=8)
    return WorkerConfig(f"test{uuid4().hex[:8]}", WorkerId("decode-0"), Epoch(1), msgspec.structs.replace(plain, **changes))


def refusal(worker: WorkerConfig) -> DiptychError:
    with pytest.raises(DiptychError) as caught:
        build_replica(worker)
    assert not list(SHM.glob(f"diptych-{worker.cluster}*")), "a refused replica left its segment"
    return caught.value


@pytest.mark.parametrize(
    ("changes", "num_blocks", "max_model_len"),
    [
        ({}, 8, 128),
        ({"num_blocks": 100}, 100, 256),
        ({"max_model_len": 50}, 8, 50),
        ({"num_blocks": None, "kv_memory_bytes": 5 * BLOCK_BYTES + 1}, 5, 80),
        ({"num_blocks": None, "kv_memory_bytes": BLOCK_BYTES}, 1, 16),
        ({"block_size": 4}, 8, 32),
    ],
)
def test_sizes(folder: Path, changes: dict[str, Any], num_blocks: int, max_model_len: int) -> None:
    """Without max_model_len a sequence may be as long as model and pool allow."""
    replica = build_replica(config(folder, **changes))
    assert (replica.pool.num_blocks, replica.engine.limits.max_model_len) == (num_blocks, max_model_len)
    assert replica.engine.pool.num_blocks == num_blocks
    assert replica.pool.tensor.dtype == torch.float32, "auto means fp32 on a CPU, whatever the folder says"
    replica.transport.close()


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"max_model_len": 257}, ModelError, "max_model_len 257 is over the model's 256 positions"),
        ({"max_model_len": 129}, PoolTooSmall, "max_model_len 129: the KV pool of 8 blocks holds 128 tokens"),
        ({"max_model_len": 1}, PoolTooSmall, "holds 128 tokens, and a prompt of one and its answer take 2"),
        ({"num_blocks": 0}, PoolTooSmall, "the KV pool of 0 blocks holds 0 tokens"),
        (
            {"num_blocks": None, "kv_memory_bytes": BLOCK_BYTES - 1},
            PoolTooSmall,
            f"kv_memory_bytes {BLOCK_BYTES - 1}: one block of 16 tokens takes {BLOCK_BYTES}",
        ),
        ({"dtype": "float8"}, ModelError, "dtype 'float8' is none of auto, float32, bfloat16, float16"),
        ({"kv_dtype": "int4"}, ModelError, "kv_dtype 'int4' is none of float32, bfloat16, float16, auto, fp8_e4m3"),
        ({"load_format": "gguf"}, ModelError, "load_format 'gguf' is none of safetensors, dummy"),
        ({"model_path": "/no/such/folder"}, ModelError, "/no/such/folder"),
        ({"load_format": "safetensors"}, WeightMismatch, ""),
        ({"num_blocks": (1 << 50) // BLOCK_BYTES}, ClusterError, "bytes of shared memory wanted"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(folder: Path, changes: dict[str, Any], kind: type[DiptychError], text: str) -> None:
    error = refusal(config(folder, **changes))
    assert isinstance(error, kind), repr(error)
    assert text in str(error)


@pytest.mark.parametrize("tp", [1, 2])
def test_an_idle_replica_measures_a_step_in_all_its_ranks(folder: Path, tp: int) -> None:
    replica = build_replica(config(folder, tp=tp, num_blocks=None, kv_memory_bytes=8 * BLOCK_BYTES))
    steps, ahead = StepWatch(StepModel(0.24, 0.0, 0.0, 0.0, 0.0)), [0.0]
    refresh = IdleRefresh(replica.engine, steps, lambda: time.monotonic() + ahead[0])
    for rank in replica.pool.ranks:
        rank.tensor.fill_(math.nan)
    for _ in range(3):                                         # kinds of steps
        ahead[0] += IDLE_SHARE * 10.0                          # longer than any of its rests, also after slow steps
        refresh.look(time.monotonic() + ahead[0])
    assert 0 < steps.model.step_s(StepFeatures(0, 0, 1, 17)) < 0.2
    assert all((~torch.isnan(rank.tensor)).any() for rank in replica.pool.ranks), "each has computed its part"
    assert replica.engine.pool.num_free == replica.pool.num_blocks
    replica.close()


def test_an_unsupported_architecture_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(MODEL | {"architectures": ["GPT2LMHeadModel"]}))
    assert isinstance(refusal(config(folder)), UnsupportedModel)


def test_a_dtype_may_be_asked_for(folder: Path) -> None:
    replica = build_replica(config(folder, dtype="bfloat16"))
    assert replica.pool.tensor.dtype == torch.bfloat16
    replica.transport.close()


@pytest.mark.parametrize(("kv_dtype", "found"), [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("fp8_e4m3", torch.float8_e4m3fn)])
def test_kv_may_be_of_another_type_and_then_more_of_it_fits(folder: Path, kv_dtype: str, found: torch.dtype) -> None:
    replica = build_replica(config(folder, kv_dtype=kv_dtype, num_blocks=None, kv_memory_bytes=8 * BLOCK_BYTES))
    assert (replica.pool.tensor.dtype, replica.pool.num_blocks) == (found, 8 * 4 // found.itemsize)
    replica.close()


# Several ranks

def test_kv_memory_is_that_of_all_ranks(folder: Path) -> None:
    replica = build_replica(config(folder, tp=2, num_blocks=None, kv_memory_bytes=8 * BLOCK_BYTES))
    assert [len(pool.tensor) for pool in replica.pool.ranks] == [8, 8]
    assert sum(pool.tensor.nbytes for pool in replica.pool.ranks) == 8 * BLOCK_BYTES
    replica.close()


@pytest.mark.parametrize("finest", [1, 4])
def test_heads_that_ranks_cannot_share_are_refused(folder: Path, finest: int) -> None:
    """This worker's, or those of the deployment's finest pool: it could write no piece to them."""
    error = refusal(msgspec.structs.replace(config(folder, tp=1 if finest > 1 else 4), finest_tp=finest))
    assert isinstance(error, ModelError)
    assert str(error) == "tp 4: num_key_value_heads is 2, which is no multiple of it"


def test_nothing_is_left_where_a_later_ranks_pool_has_no_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, allocate = list[ShmTransport](), ShmTransport.allocate

    def second_fails(self: ShmTransport, layout: KVLayout, num_blocks: int) -> KVPool:
        made.append(self)
        if len(made) == 2:
            raise ClusterError("full")
        return allocate(self, layout, num_blocks)

    monkeypatch.setattr(ShmTransport, "allocate", second_fails)
    before = threading.active_count()
    assert str(refusal(config(folder, tp=2))) == "full"
    assert len(made) == 2
    _wait_for_threads(before)


def test_a_closed_replica_has_no_threads(folder: Path) -> None:
    before = threading.active_count()
    replica = build_replica(config(folder, tp=2))
    assert threading.active_count() > before
    replica.close()
    _wait_for_threads(before)


def _wait_for_threads(count: int) -> None:
    give_up_at = time.monotonic() + 10
    while threading.active_count() > count:
        assert time.monotonic() < give_up_at, f"{threading.enumerate()}"
        time.sleep(0.01)


# A staging pool

def test_receivers_of_the_same_layout_need_none(folder: Path) -> None:
    same = msgspec.structs.replace(config(folder), receiver=ReceiverPool(16, "float32"))       # what "auto" is here
    replica = build_replica(same)
    assert replica.staging is None
    assert replica.outbound == (replica.transport, replica.pool)
    replica.close()


def test_it_has_the_receivers_layout_and_no_more_blocks_than_the_pool_would_fill(folder: Path) -> None:
    replica = build_replica(msgspec.structs.replace(config(folder, num_blocks=5), receiver=ReceiverPool(64, "fp8_e4m3")))
    assert replica.staging is not None
    layout = replica.staging.layout
    assert (layout.block_size, layout.dtype, layout.model) == (64, torch.float8_e4m3fn, replica.pool.layout.model)
    assert replica.staging.pool.num_blocks == 2
    assert replica.outbound == (replica.staging.transport, replica.staging.pool)
    replica.close()


def test_it_is_bounded_and_gone_when_the_replica_closes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_module, "STAGING_BYTES", {"cpu": 3 * BLOCK_BYTES // 2})
    worker = msgspec.structs.replace(config(folder), receiver=ReceiverPool(8, "auto"))
    replica = build_replica(worker)
    assert replica.staging is not None
    assert replica.staging.pool.num_blocks == 3
    replica.close()
    assert not list(SHM.glob(f"diptych-{worker.cluster}*"))


# Which weights share KV

def fingerprint_of(folder: Path, weights: dict[str, torch.Tensor], **config_changes: Any) -> str:
    (folder / "config.json").write_text(json.dumps(MODEL | config_changes))
    save_file(weights, folder / "model.safetensors")
    return fingerprint(folder, LoadFormat.SAFETENSORS)


def test_a_fingerprint_tells_models_apart(folder: Path) -> None:
    """Above all two fine-tunes of one base: their names, shapes and sizes are equal, and their KV is not."""
    base = {"a": torch.zeros(600_000), "b": torch.zeros(600_000)}
    tuned = {"a": base["a"], "b": base["b"] + 1e-3}
    seen = [
        fingerprint_of(folder, base),
        fingerprint_of(folder, tuned),
        fingerprint_of(folder, {"a": base["a"], "c": base["b"]}),
        fingerprint_of(folder, {"a": base["a"], "b": base["b"][:-1]}),
        fingerprint_of(folder, base, rope_theta=1e6),
        fingerprint(folder, LoadFormat.DUMMY),
    ]
    assert len(set(seen)) == len(seen)


def test_a_fingerprint_is_of_what_is_in_the_folder_not_of_where_it_is(folder: Path) -> None:
    weights = {"a": torch.arange(10.0)}
    copy = folder / "copy"
    copy.mkdir()
    assert fingerprint_of(folder, weights) == fingerprint_of(copy, weights)
    (copy / "README.md").write_text("other notes")
    assert fingerprint(folder, LoadFormat.SAFETENSORS) == fingerprint(copy, LoadFormat.SAFETENSORS)
    (copy / "model-2.safetensors").write_bytes((copy / "model.safetensors").read_bytes())
    assert fingerprint(folder, LoadFormat.SAFETENSORS) != fingerprint(copy, LoadFormat.SAFETENSORS)
