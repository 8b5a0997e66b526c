"""Runs `two_hosts.py` in a process of its own, which enters a network for good."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness.ucx import needs_ucx

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240

@needs_ucx
def test_a_deployment_on_two_hosts() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(Path(__file__).with_name("two_hosts.py"))]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}          # another head's
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = process.communicate(timeout=TIMEOUT_S)
    except BaseException:
        process.send_signal(signal.SIGINT)                   # so that it takes its hosts down
        said, _ = process.communicate(timeout=30)
        print(said[-8000:])
        raise
    if process.returncode == 0 and " passed" not in said:
        pytest.skip(said.partition("SKIPPED")[2].strip())
    assert process.returncode == 0, said[-8000:]
