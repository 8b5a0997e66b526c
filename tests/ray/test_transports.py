"""A deployment whose KV travels over `ucx`: the same answers as colocated, also after a worker was killed."""

import pytest
from harness.ucx import needs_ucx

from diptych.cluster.pulse import DeploymentStatus
from diptych.kvtransfer.selection import AS_FAST
from diptych.messages.requests import RequestSpan

from .conftest import Cluster, StartCluster

PROMPTS = ["The for statement", "import os\n" * 30, "A list is a sequence of"]

pytestmark = needs_ucx


def test_served_over_ucx_on_loopback(cluster: StartCluster, colocated: Cluster) -> None:
    def answers(served: Cluster, seed: int = 3) -> list[str]:
        return [served.complete(prompt, max_tokens=24, temperature=0.8, seed=seed)["choices"][0]["text"] for prompt in PROMPTS]

    expected, apart = answers(colocated), cluster(transfer={"transports": ["ucx"]})
    assert answers(apart) == expected
    assert last_transport(apart) == "ucx"
    for victim in ("decode-0", "prefill-0"):
        apart.wait_until_back(apart.kill(victim))
        assert answers(apart) == expected


def test_a_pair_measures_both_of_its_transports_and_uses_the_fastest(cluster: StartCluster) -> None:
    apart = cluster(transfer={"transports": ["ucx", "shm"]})
    apart.wait_for(lambda status: bool(apart.place("prefill-0").links), 30)
    [link] = apart.place("prefill-0").links
    figures = [link, *link.others]
    assert sorted(each.transport for each in figures) == ["shm", "ucx"]
    assert link.gbps >= AS_FAST * max(each.gbps for each in figures)
    apart.complete(PROMPTS[0])
    assert last_transport(apart) == link.transport


def last_transport(served: Cluster) -> str:
    """Of the last request; waits for the gateway's next report, since an answer is there before it."""
    def span(status: DeploymentStatus) -> RequestSpan | None:
        return next((place.gateway.last_span for place in status.places if place.gateway and place.gateway.last_span), None)

    last = span(served.wait_for(lambda status: span(status) is not None, 10))
    assert last is not None
    return last.transport


def test_an_unknown_transport_is_refused_before_anything_starts(cluster: StartCluster) -> None:
    from diptych.messages.errors import SpecError

    with pytest.raises(SpecError, match="'carrier_pigeon' is not there yet"):
        cluster(transfer={"transports": ["carrier_pigeon"]})
