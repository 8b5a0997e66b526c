"""A model that the device's kernels cannot take is refused by name, before its weights are read."""

from pathlib import Path

import pytest
from harness.families import CASES, save_random_model

from diptych.engine.config import EngineConfig, WorkerConfig
from diptych.engine.replica import build_replica
from diptych.messages.errors import ModelError
from diptych.messages.ids import Epoch, WorkerId


def test_a_head_size_without_a_kernel(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    save_random_model(CASES["llama-3-heads-on-1"], tmp_path)
    engine = EngineConfig(model_path=str(tmp_path), device="cuda", block_size=16)
    with pytest.raises(ModelError, match="blocks of 16 tokens: head_dim 8: the CUDA kernels take 64"):
        build_replica(WorkerConfig("test", WorkerId("w"), Epoch(1), engine))
