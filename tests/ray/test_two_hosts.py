"""Runs `two_hosts.py` in a process of its own, which enters a network for good."""

import subprocess
import sys
from pathlib import Path

import pytest
from harness.ucx import needs_ucx

ROOT = Path(__file__).parents[2]


@needs_ucx
def test_a_deployment_on_two_hosts() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(Path(__file__).with_name("two_hosts.py"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if done.returncode == 0 and "1 skipped" in done.stdout:
        pytest.skip(done.stdout.partition("SKIPPED")[2].strip())
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
