"""A deployment whose KV travels over `ucx`: the same answers as colocated, also after a worker was killed."""

import pytest
from harness.ucx import needs_ucx

from .conftest import Cluster, StartCluster

PROMPTS = ["The for statement", "import os\n" * 30, "A list is a sequence of"]

pytestmark = needs_ucx


def test_served_over_ucx_on_loopback(cluster: StartCluster, colocated: Cluster) -> None:
    def answers(served: Cluster, seed: int = 3) -> list[str]:
        return [served.complete(prompt, max_tokens=24, temperature=0.8, seed=seed)["choices"][0]["text"] for prompt in PROMPTS]

    expected, apart = answers(colocated), cluster(transfer={"transports": ["ucx"]})
    assert answers(apart) == expected
    span = next(gateway.gateway.last_span for gateway in apart.status.places if gateway.gateway is not None)
    assert span is not None
    assert span.transport == "ucx"
    for victim in ("decode-0", "prefill-0"):
        apart.wait_until_back(apart.kill(victim))
        assert answers(apart) == expected


def test_an_unknown_transport_is_refused_before_anything_starts(cluster: StartCluster) -> None:
    from diptych.messages.errors import SpecError

    with pytest.raises(SpecError, match="'carrier_pigeon' is not there yet"):
        cluster(transfer={"transports": ["carrier_pigeon"]})
