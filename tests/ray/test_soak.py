"""The short form of tests/bench/soak.py: a worker is killed every few seconds under load."""

import asyncio

import pytest
from harness.soak import Soak
from harness.ucx import needs_ucx

from .conftest import StartCluster


@pytest.mark.parametrize("transport", ["shm", pytest.param("ucx", marks=needs_ucx)])
def test_workers_killed_under_load(cluster: StartCluster, transport: str) -> None:
    served = cluster(transfer={"transports": [transport]})
    soak = Soak(served.deployment, served.endpoint, served.model, ("prefill-0", "decode-0"))
    summary = asyncio.run(soak.run(duration_s=20.0, pause_s=3.0))
    print(summary)
    assert summary.good, summary
    assert summary.num_kills >= 1
