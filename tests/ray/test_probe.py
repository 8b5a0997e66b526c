"""A deployment's workers measure their links when they meet; a floor that no link reaches keeps requests off them."""

from diptych.cluster.links import pairs_of

from .conftest import StartCluster

SMALL = {"workers": 1, "kv_memory": "32MiB"}


def test_links_are_measured_and_served_over(cluster: StartCluster) -> None:
    served = cluster(pools={"prefill": SMALL, "decode": SMALL}, transfer={"min_gbps": 1e6, "below_floor": "warn"})
    status = served.wait_for(lambda status: all(pair.link is not None for pair in pairs_of(status)), 20)
    (pair,) = pairs_of(status)
    assert pair.link is not None
    assert (pair.prefill, pair.decode, pair.link.transport, pair.link.refused) == ("prefill-0", "decode-0", "shm", False)
    assert pair.link.below_floor
    assert served.complete("x", max_tokens=4)["choices"][0]["text"]
