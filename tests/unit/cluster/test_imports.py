"""The controller, the gateway and the commands start quickly: they load neither torch nor what draws plots."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "matplotlib", "transformers")


@pytest.mark.parametrize("module", ["controller_shell", "gateway_shell", "gateway.server", "cli", "spec"])
def test_no_heavy_import(module: str) -> None:
    script = f"import sys, diptych.cluster.{module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
