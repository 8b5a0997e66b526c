"""The commands as a user types them, each a process of its own, on a Ray head of their own."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from diptych.cluster import records
from diptych.kvtransfer.shm import sweep_orphans

SPEC = """
name: test-commands
model: {path: embedded}
pools: {decode: {workers: 1, kv_memory: 32MiB}}
router: {port: 0, explain: 10, debug_headers: true}
security: {api_keys_file: keys.txt}
"""


@pytest.fixture
def no_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder, in a world where no Ray is known; nothing of one may be left at the end."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("TMPDIR", "/tmp")
    yield tmp_path
    assert processes_of(tmp_path) == []
    assert [*sweep_orphans("demo"), *sweep_orphans("test-commands")] == []     # somebody else's, who lives, are none of ours


def processes_of(state_home: Path) -> list[str]:
    """What was started, by whatever way, from a command of this test: the environment is inherited."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get("XDG_STATE_HOME") == str(state_home):
                found.append(" ".join(process.cmdline()) or process.name())
    return found


def diptych(*words: str, folder: Path, code: int = 0) -> str:
    command = [sys.executable, "-c", "from diptych.cluster.cli import main; main()", *words]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == code, f"{ended.stdout}\n{ended.stderr}"
    return ended.stdout + ended.stderr


def test_demo(no_ray: Path) -> None:
    text = diptych("demo", folder=no_ray)
    for shown in ("> ", "TTFT", "TPOT", "KV moved", "prefill-0 → decode-0", "shm", "GB/s", "/v1", "All stopped"):
        assert shown in text
    assert records.read_all() == []


def test_up_status_chat_down(no_ray: Path) -> None:
    (no_ray / "spec.yaml").write_text(SPEC)
    (no_ray / "keys.txt").write_text("secret\n")
    shown = diptych("up", "spec.yaml", "--json", folder=no_ray)
    status = json.loads(shown[shown.index("{") : shown.rindex("}") + 1])
    assert status["phase"] == "ready"
    assert "running already" in diptych("up", "spec.yaml", folder=no_ray, code=2)
    (no_ray / "gpus.yaml").write_text("{name: gpus, model: {path: embedded, device: cuda}, pools: {decode: {workers: 99}}}")
    assert "the workers need 99 GPU(s)" in diptych("up", "gpus.yaml", folder=no_ray, code=1)
    assert "decode-0" in diptych("status", folder=no_ray)
    assert diptych("chat", "What is a list?", "--api-key", "secret", "--max-tokens", "5", folder=no_ray).strip()
    assert "401" in diptych("chat", "Hi", "--api-key", "wrong", folder=no_ray, code=1)
    url, key = records.find("test-commands").endpoint, {"authorization": "Bearer secret"}
    model = httpx.get(f"{url}/v1/models", headers=key, trust_env=False).json()["data"][0]["id"]
    body = {"model": model, "prompt": "A list", "max_tokens": 3}
    reply = httpx.post(f"{url}/v1/completions", json=body, headers=key, timeout=60.0, trust_env=False)
    assert reply.headers["x-diptych-route"] == "decode-0"
    assert "decode-0 alone" in diptych("explain", reply.json()["id"], folder=no_ray)
    assert "finished" in diptych("explain", reply.headers["x-request-id"], "--json", folder=no_ray)
    diptych("explain", "cmpl-none", folder=no_ray, code=6)
    assert "is down" in diptych("down", folder=no_ray)
    diptych("status", folder=no_ray, code=1)
