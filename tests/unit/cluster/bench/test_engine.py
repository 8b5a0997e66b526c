"""`diptych bench engine` on a CPU, and the counting of what a step must move and compute."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diptych.cluster.bench.command import app
from diptych.cluster.bench.engine_rows import Ceilings, decode_work, floor, kv_elements, linear_elements, prefill_work
from diptych.models.config import ModelConfig
from diptych.models.embedded.path import embedded_model_path
from diptych.models.weights import weight_plan

MODEL = ModelConfig.from_folder(embedded_model_path())


def test_the_command_writes_rows_and_a_picture(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "engine.json"), "--png", str(tmp_path / "engine.png")]
    done = CliRunner().invoke(app, ["engine", str(embedded_model_path()), "--device", "cpu", "--quick", "--repeats", "3", *files])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "engine.json").read_text())
    assert [(row["kind"], row["shape"]) for row in report["rows"]] == [
        ("prefill", "1×64"), ("prefill", "2×32"), ("decode", "b1 ctx 64"), ("decode", "b2 ctx 32"),
    ]  # fmt: skip
    assert all(row["ms"] > 0 and row["floor_ms"] > 0 for row in report["rows"])
    assert (tmp_path / "engine.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_a_model_is_a_usage_error(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["engine", str(tmp_path), "--device", "cpu"])
    assert done.exit_code == 2


def test_every_matrix_is_counted_once() -> None:
    plan = weight_plan(MODEL)
    matrices = [param for layer in plan.layers for param in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    assert linear_elements(MODEL) == sum(math.prod(param.shape) for param in matrices)


def test_a_prompt_of_one_token_is_a_decode_without_context() -> None:
    """But for its KV, which a decode reads and a prompt writes."""
    prompt, decode = prefill_work(MODEL, 1, 1, 2), decode_work(MODEL, 1, 1, 2)
    assert prompt == pytest.approx(decode)


def test_attention_grows_with_the_pairs() -> None:
    """Llama's 4 · pairs · heads · head_dim a layer, on top of what the tokens cost."""
    (_, short), (_, long) = prefill_work(MODEL, 1, 100, 2), prefill_work(MODEL, 1, 200, 2)
    per_pair = 4 * MODEL.num_layers * MODEL.num_heads * MODEL.head_dim
    assert long - short == 2 * 100 * linear_elements(MODEL) + per_pair * (200 * 201 - 100 * 101) / 2


def test_the_floor_is_the_slower_of_the_two() -> None:
    ceilings = Ceilings(bytes_per_s=100.0, flops_per_s=1000.0)
    assert floor(200.0, 1000.0, ceilings) == (2000.0, "bytes")
    assert floor(50.0, 1000.0, ceilings) == (1000.0, "FLOPs")
    assert kv_elements(MODEL) == 2 * MODEL.num_layers * MODEL.num_kv_heads * MODEL.head_dim
